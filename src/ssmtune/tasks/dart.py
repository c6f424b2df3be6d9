"""DART (Nan et al. 2021): triples of subject, relation and object to a sentence. Official metric: BLEU."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import text_corpus, text_score


def row_of(found: Row) -> Row:
    """Return a row of ours: triples in brackets, and every sentence that the set gives for them."""
    triples = ", ".join(f"({' | '.join(triple)})" for triple in found["tripleset"])
    return {"input": triples, "target": found["target"], "references": found["references"] or [found["target"]]}


TASK = SourcedTask(
    name="dart",
    version=1,
    kind="text",
    instruction="Say all of these facts in one or two sentences.",
    folder="data2text_dart",
    licence="MIT",
    samples=(
        {"input": "(Oslo | country | Norway)", "target": "Oslo lies in Norway."},
        {"input": "(Ada | profession | pilot), (Ada | age | 41)", "target": "Ada, a pilot, is 41 years old."},
    ),
    primary="chrf",
    metrics=("chrf", "rougeL"),
    max_new_tokens=128,
    scorer=text_score,
    corpus=text_corpus,
    corpus_metrics=("bleu", "chrf"),
    hub=Hub(
        path="GEM/dart",
        revision="refs/convert/parquet",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=row_of,
    ),
)
