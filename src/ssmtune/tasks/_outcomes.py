"""What many answers to one task come to: means, means by variation, and what guessing would have given."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ssmtune.tasks.base import Example, Task

MAX_VARIATIONS = 64
"""With more variations than these, scores by variation would be scores of single examples."""


def commonest(task: Task, examples: Sequence[Example]) -> float | None:
    """Return the mean of the primary metric when every answer is the commonest one; None where nobody can guess."""
    if not task.chance or not examples:
        return None
    answer = Counter(example.output for example in examples).most_common(1)[0][0]
    return sum(task.score(answer, example)[task.primary] for example in examples) / len(examples)


def by_variation(
    task: Task, examples: Sequence[Example], scores: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return {variation: {metric: mean, "num": examples}}; empty where there is one, or too many to tell anything."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        found[example.variation].append(score)
    if not 1 < len(found) <= MAX_VARIATIONS:
        return {}
    return {name: {**means(task, found[name]), "num": len(found[name])} for name in sorted(found)}


def means(task: Task, scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every metric."""
    return {metric: sum(s[metric] for s in scores) / len(scores) for metric in task.metrics}
