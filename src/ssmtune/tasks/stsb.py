"""GLUE's STS-B (Cer et al. 2017): how alike are two sentences, from 0 to 5? Official metrics: Pearson and Spearman.

`closeness` is 1 less a fifth of the distance, per example, and so can be paired; an answer without a number has 0 of it
and counts as 2.5, in the middle of the scale, in the correlations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ssmtune.tasks._glue import glue_hub, sentence_row
from ssmtune.tasks._labels import first_line
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import SourcedExample

HIGHEST = 5.0


def read_value(text: str) -> float | None:
    """Return the number that the first line of an answer starts with, None when it does not or lies outside 0 to 5."""
    match = re.match(r"\d+(\.\d+)?(?=\s|$)", first_line(text))
    value = float(match.group()) if match else None
    return value if value is not None and value <= HIGHEST else None


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return how close the number is, and whether there is one."""
    value = read_value(text)
    if value is None:
        return {"closeness": 0.0, "readable": 0.0}
    return {"closeness": 1 - abs(value - float(example.output)) / HIGHEST, "readable": 1.0}


def correlations(texts: Sequence[str], examples: Sequence[SourcedExample]) -> dict[str, float]:
    """Return both correlations over all examples; 0 when either side never varies."""
    from scipy import stats

    values = [read_value(text) for text in texts]
    given = [HIGHEST / 2 if value is None else value for value in values]
    expected = [float(example.output) for example in examples]
    if len(set(given)) < 2 or len(set(expected)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(given, expected)[0]),
        "spearman": float(stats.spearmanr(given, expected)[0]),
    }


TASK = SourcedTask(
    name="stsb",
    version=1,
    kind="regression",
    instruction="How alike in meaning are these two sentences? Answer with a number from 0.0 to 5.0.",
    folder="glue_stsb",
    licence="CC-BY-SA-4.0",
    restriction="share-alike",
    samples=(
        {"input": "first: A dog runs.\nsecond: A dog is running.", "target": "5.0"},
        {"input": "first: A dog runs.\nsecond: A man cooks rice.", "target": "0.0"},
    ),
    primary="closeness",
    metrics=("closeness", "readable"),
    max_new_tokens=16,
    scorer=score,
    corpus=correlations,
    corpus_metrics=("pearson", "spearman"),
    test_split="validation",
    hub=glue_hub(
        "stsb",
        sentence_row([("sentence1", "first"), ("sentence2", "second")], lambda row: f"{row['label']:.1f}"),
    ),
)
