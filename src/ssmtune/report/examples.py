"""Examples won and lost: how often one arm scores higher than another on the same example, and what both answered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ssmtune.report.arms import Arm, Collection, Panel, origin
from ssmtune.report.sections import Sample, Section
from ssmtune.report.sources import Record, Source
from ssmtune.report.tables import Cell, Column, Table

MAX_EXAMPLES = 24
"""Examples with their texts per task: those on which the arms differ come first where there are more."""
CLEAR = 1e-9
"""Scores closer than this are the same score, written in another way."""


def examples(collection: Collection) -> Section:
    """Counts of examples won and lost for every declared comparison, and the recorded texts side by side."""
    samples = [s for panel in collection.panels.values() for s in _samples(collection, panel)]
    counts = _counts(collection)
    columns = (
        Column("task"),
        Column("arm"),
        Column("against"),
        Column("won", num=True),
        Column("lost", num=True),
        Column("same score", num=True),
        Column("answers compared", num=True),
    )
    return Section(
        "samples",
        "Examples won and lost",
        tables=[Table("examples", "Answers that score higher (won) or lower (lost)", columns, counts)]
        if counts
        else [],
        samples=samples,
        how="Won and lost count pairs of answers to the same example at the same seed, by the primary outcome. "
        "Below are the texts that the records hold (the first examples of each evaluation, at each arm's first seed, "
        "not chosen by result; where there are more than "
        f"{MAX_EXAMPLES} of a task, those on which the arms differ come first).",
        empty="No sample generations in these records.",
    )


def _counts(collection: Collection) -> list[list[Cell]]:
    rows = []
    for study in collection.studies:
        for c in study.record["comparisons"]:
            arms = [collection.arms.get(name) for name in (c["arm"], c["baseline"])]
            found = [arm.evaluations.get(c["task"], []) for arm in arms if arm is not None]
            if len(found) == 2 and all(found):
                row = _paired_counts(found[0], found[1], c["metric"])
                if row is not None:
                    won, lost, same = row
                    rows.append(
                        [
                            Cell(c["task"], c["task"]),
                            collection.key(c["arm"]),
                            collection.key(c["baseline"]),
                            Cell(f"{won:,}", won, href=origin(found[0])),
                            Cell(f"{lost:,}", lost, href=origin(found[1])),
                            Cell(f"{same:,}", same),
                            Cell(f"{won + lost + same:,}", won + lost + same),
                        ]
                    )
    return rows


def _paired_counts(own: Sequence[Source], other: Sequence[Source], metric: str) -> tuple[int, int, int] | None:
    """Answers won, lost and alike, paired by example, seed and data order."""
    won = lost = same = 0
    for source, partner in itertools.product(own, other):
        one, pair = source.record, partner.record
        # A base has no seeds, and draws of a placement are no pairs: each is compared with each.
        fits = source.untrained or partner.untrained or source.run[:2] == partner.run[:2]
        if not fits or metric not in one["scores"] or metric not in pair["scores"]:
            continue
        if pair["example_ids"] != one["example_ids"]:
            return None
        for a, b in zip(one["scores"][metric], pair["scores"][metric], strict=True):
            won, lost, same = won + (a > b + CLEAR), lost + (b > a + CLEAR), same + (abs(a - b) <= CLEAR)
    return (won, lost, same) if won + lost + same else None


def _samples(collection: Collection, panel: Panel) -> list[Sample]:
    """Examples that every arm answered, at each arm's first seed."""
    task, metric = panel.name, panel.primary
    answers: dict[str, Mapping[str, Record]] = {}
    for arm in collection.arms.values():
        if found := {s["id"]: s for s in _recorded(arm, task)}:
            answers[arm.name] = found
    if not answers:
        return []
    first = next(iter(answers.values()))
    common = [i for i in first if all(i in found for found in answers.values())]
    if len(common) > MAX_EXAMPLES:
        common.sort(key=lambda i: len({found[i]["scores"].get(metric) for found in answers.values()}) == 1)
        del common[MAX_EXAMPLES:]
    return [
        Sample(
            task,
            metric,
            str(number),
            first[number]["prompt"],
            first[number]["expected"],
            [_answer(collection.arms[name], found[number], metric) for name, found in answers.items()],
        )
        for number in common
    ]


def _recorded(arm: Arm, panel: str) -> Sequence[Record]:
    evaluations = arm.evaluations.get(panel, [])
    return (evaluations[0].record.get("samples") or []) if evaluations else []


def _answer(arm: Arm, sample: Record, metric: str) -> tuple[Arm, str, float]:
    return arm, sample["completion"], float(sample["scores"].get(metric, 0.0))
