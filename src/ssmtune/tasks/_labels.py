"""Answers that are one of a few labels: reading them, scoring them, and the statistics of all answers together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from ssmtune.tasks.base import SourcedExample

METRICS = ("accuracy", "mentioned")

UNREADABLE = ""
"""What an answer that is no label counts as: a class of its own, never right."""


def first_line(text: str) -> str:
    """Return the first line that is not empty, without quotes, a full stop and spaces around it, in lower case."""
    lines = text.strip().splitlines()
    return lines[0].strip(" \t\"'`*.").lower() if lines else ""


def read_label(text: str, labels: Sequence[str]) -> str:
    """Return the label that the first line of an answer is, or `UNREADABLE`."""
    line = first_line(text)
    return next((label for label in labels if label.lower() == line), UNREADABLE)


def first_mentioned(text: str, labels: Sequence[str]) -> str:
    """Return the label that stands first in the first line, as words of its own, the longest of those at one place."""
    line = first_line(text)
    found = []
    for label in labels:
        match = re.search(rf"(?<!\w){re.escape(label.lower())}(?!\w)", line)
        if match:
            found.append((match.start(), -len(label), label))
    return min(found)[2] if found else UNREADABLE


def label_scorer(labels: Sequence[str]) -> Callable[[str, SourcedExample], dict[str, float]]:
    """Return a scorer: `accuracy`, the first line is the label and nothing else; `mentioned`, it is the first one named."""

    def score(text: str, example: SourcedExample) -> dict[str, float]:
        return {
            "accuracy": float(read_label(text, labels) == example.output),
            "mentioned": float(first_mentioned(text, labels) == example.output),
        }

    return score


def matthews(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the Matthews correlation of any number of classes (Gorodkin 2004); 0 where one side never varies.

    >>> matthews(["a", "a", "b"], ["a", "b", "b"])
    0.5
    """
    num, right = len(expected), sum(e == p for e, p in zip(expected, predicted, strict=True))
    there, given = Counter(expected), Counter(predicted)
    both = sum(there[c] * given[c] for c in there)
    spread = (num**2 - sum(n**2 for n in there.values())) * (num**2 - sum(n**2 for n in given.values()))
    return float((right * num - both) / spread**0.5) if spread else 0.0


def f1(expected: Sequence[str], predicted: Sequence[str], positive: str) -> float:
    """Return the F1 of one class; 0 when it is neither there nor given.

    >>> f1(["a", "a", "b"], ["a", "b", "b"], "a")
    0.6666666666666666
    """
    hits = sum(e == p == positive for e, p in zip(expected, predicted, strict=True))
    total = Counter(expected)[positive] + Counter(predicted)[positive]
    return 2 * hits / total if total else 0.0


def label_corpus(
    labels: Sequence[str], *, positive: str | None = None, correlation: bool = False
) -> Callable[[Sequence[str], Sequence[SourcedExample]], dict[str, float]]:
    """Return the statistics of all answers: F1 of `positive`, Matthews correlation, the share of answers that are labels."""

    def corpus(texts: Sequence[str], examples: Sequence[SourcedExample]) -> dict[str, float]:
        expected = [example.output for example in examples]
        predicted = [read_label(text, labels) for text in texts]
        found = {"readable": sum(p != UNREADABLE for p in predicted) / len(predicted)}
        if positive is not None:
            found["f1"] = f1(expected, predicted, positive)
        if correlation:
            found["matthews"] = matthews(expected, predicted)
        return found

    return corpus
