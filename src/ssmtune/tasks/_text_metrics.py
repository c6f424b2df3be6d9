"""Likeness of texts: ROUGE, BLEU and chrF by their own packages, F1 over words as SQuAD counts it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ssmtune.errors import MissingDependency
from ssmtune.tasks.base import SourcedExample

INSTALL = "pip install 'ssmtune[eval]'"

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (F1, stemmed; Lin 2004), each the best over the references."""
    scored = [_rouge_scorer().score(reference, text) for reference in references]
    return {name: float(max(entry[name].fmeasure for entry in scored)) for name in ROUGE}


def chrf(text: str, references: Sequence[str]) -> float:
    """Return the character F-score of one answer (chrF2, Popovic 2015) from 0 to 1, the best over the references."""
    from_package = _sacrebleu()
    return float(from_package.sentence_chrf(text, list(references)).score) / 100


def text_score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return chrF and ROUGE-L of one answer against all its references."""
    answer = text.strip()
    return {"chrf": chrf(answer, example.references), "rougeL": rouge(answer, example.references)["rougeL"]}


def summary_score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return the three ROUGE scores of one answer."""
    return rouge(text.strip(), example.references)


def text_corpus(texts: Sequence[str], examples: Sequence[SourcedExample]) -> dict[str, float]:
    """Return BLEU (Papineni et al. 2002; sacrebleu's tokens 13a) and chrF of all answers together, from 0 to 1."""
    package = _sacrebleu()
    references = [example.references for example in examples]
    # One list a place among the references; an example that has fewer leaves its later places empty.
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
    answers = [text.strip() for text in texts]
    return {
        "bleu": float(package.corpus_bleu(answers, streams).score) / 100,
        "chrf": float(package.corpus_chrf(answers, streams).score) / 100,
    }


def word_f1(text: str, references: Sequence[str]) -> float:
    """Return the F1 over words without articles and punctuation, the best over the references (Rajpurkar et al. 2016).

    >>> word_f1("The old house.", ["an old barn"])
    0.5
    """
    return max(_word_f1(_words(text), _words(reference)) for reference in references)


def _word_f1(given: list[str], expected: list[str]) -> float:
    shared = sum((Counter(given) & Counter(expected)).values())
    return 2 * shared / (len(given) + len(expected)) if shared else 0.0


def _words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError:
        raise MissingDependency(f"ROUGE needs the package rouge-score: {INSTALL}") from None
    return rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise MissingDependency(f"BLEU and chrF need the package sacrebleu: {INSTALL}") from None
    return sacrebleu
