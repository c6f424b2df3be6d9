"""The nine tasks of GLUE (Wang et al. 2018): what they have in common, so that each file says what differs.

The labels of GLUE's own test sets are secret, so the validation split is the test side here, as in all published work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._sourced import SourcedTask

PATH = "nyu-mll/glue"


def sentence_row(fields: Sequence[tuple[str, str]], label: Callable[[Row], str]) -> Callable[[Row], Row]:
    """Return what makes a row of ours from one of the hub's: `fields` are (column, the word it is shown under)."""

    def row(found: Row) -> Row:
        shown = [found[column] for column, _ in fields]
        if len(fields) > 1:
            shown = [f"{word}: {text}" for (_, word), text in zip(fields, shown, strict=True)]
        return {"input": "\n".join(shown), "target": label(found)}

    return row


def glue_hub(name: str, row: Callable[[Row], Row], validation: str = "validation") -> Hub:
    """Return where a task of GLUE lies on the hub."""
    return Hub(path=PATH, config=name, splits={"train": "train", "validation": validation}, row=row)


def glue_task(
    name: str,
    *,
    instruction: str,
    fields: Sequence[tuple[str, str]],
    labels: dict[str, str],
    samples: tuple[Row, ...],
    licence: str,
    positive: str | None = None,
    correlation: bool = False,
    validation: str = "validation",
) -> SourcedTask:
    """Return a task of GLUE whose answer is a word; `labels` maps the hub's names to the words."""
    words = tuple(labels.values())
    return SourcedTask(
        name=name,
        version=1,
        kind="classification",
        instruction=instruction,
        folder=f"glue_{name}",
        licence=licence,
        samples=samples,
        primary="accuracy",
        metrics=METRICS,
        chance=1 / len(words),
        max_new_tokens=16,
        scorer=label_scorer(words),
        corpus=label_corpus(words, positive=positive, correlation=correlation),
        corpus_metrics=(
            "readable",
            *(["f1"] if positive is not None else []),
            *(["matthews"] if correlation else []),
        ),
        test_split="validation",
        hub=glue_hub(name, sentence_row(fields, lambda row: labels[row["label"]]), validation),
    )
