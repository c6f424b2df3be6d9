"""CLINC150 (Larson et al. 2019): which of 150 intents has a request, or is it out of scope (`oos`)?

The intents are not listed in the prompt: a model has to learn them, or be shown some (`--shots`).
"""

from __future__ import annotations

from collections.abc import Sequence

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._labels import first_line
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import SourcedExample

OUT_OF_SCOPE = "oos"


def read_intent(text: str) -> str:
    """Return the first line as an intent is written."""
    return "_".join(first_line(text).split())


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether the first line is the intent."""
    return {"accuracy": float(read_intent(text) == example.output)}


def by_scope(texts: Sequence[str], examples: Sequence[SourcedExample]) -> dict[str, float]:
    """Return accuracy within the 150 intents, and recall of what is out of scope; 0 where there is none."""
    right: dict[bool, list[float]] = {True: [], False: []}
    for text, example in zip(texts, examples, strict=True):
        right[example.output == OUT_OF_SCOPE].append(score(text, example)["accuracy"])
    means = {out: sum(values) / len(values) if values else 0.0 for out, values in right.items()}
    return {"in_scope_accuracy": means[False], "out_of_scope_recall": means[True]}


TASK = SourcedTask(
    name="clinc150",
    version=1,
    kind="classification",
    instruction="Name the intent of this request, or 'oos' if it has none of those you know.",
    folder="intent_clinc150",
    licence="CC-BY-3.0",
    restriction="attribution",
    samples=(
        {"input": "wake me at six tomorrow", "target": "alarm"},
        {"input": "put two hundred dollars into my savings", "target": "transfer"},
        {"input": "who wrote the score of that film", "target": OUT_OF_SCOPE},
    ),
    primary="accuracy",
    metrics=("accuracy",),
    chance=1 / 151,
    max_new_tokens=24,
    scorer=score,
    corpus=by_scope,
    corpus_metrics=("in_scope_accuracy", "out_of_scope_recall"),
    hub=Hub(
        path="clinc/clinc_oos",
        config="plus",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=lambda row: {"input": row["text"], "target": row["intent"]},
    ),
)
