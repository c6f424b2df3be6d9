"""Outcomes: the headline tables, every metric with its interval, and what trained parameters buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmtune.report import plots, text
from ssmtune.report.arms import Arm, Collection, Compared, Panel, is_share, origin
from ssmtune.report.sections import Figure, Figures, Section
from ssmtune.report.sources import Source, records_of
from ssmtune.report.tables import Cell, Column, Table, file_name
from ssmtune.study import metric_interval

INTERVAL = Column("95 % interval", parts=("low", "high"))
VERDICTS: dict[str, Any] = {"no difference": "quiet", "equivalent": "quiet", "": ""}


def headline(collection: Collection, comparisons: Compared) -> Section:
    """One table per task: each arm's primary outcome, and its difference to the base from `comparisons`."""
    tables = []
    for panel in collection.panels.values():
        if panel.is_transfer:
            continue
        metric = panel.primary
        columns = (
            Column("arm"),
            Column(metric, num=True),
            INTERVAL,
            Column("over"),
            Column("difference to base", num=True),
            Column("95 % interval of the difference", parts=("low", "high")),
            Column("verdict"),
            Column("trained parameters", num=True),
        )
        percent = collection.is_percent(panel.name)
        rows = []
        for arm in collection.arms.values():
            if evaluations := arm.evaluations.get(panel.name):
                interval, over, values = metric_interval(records_of(evaluations), metric)
                compared = comparisons.get((arm.name, panel.name))
                shown = text.metric_text(interval.mean, percent=percent)
                rows.append(
                    [
                        collection.key(arm.name),
                        Cell(shown, interval.mean, href=origin(evaluations)),
                        interval_cell(interval.low, interval.high, percent=percent),
                        _over(evaluations, over, interval.num),
                        *_difference(compared, evaluations, percent=percent),
                        trained(arm, panel),
                    ]
                )
        caption = f"{panel.name} (primary outcome: {metric}{_commonest(collection, panel)})"
        tables.append(Table(file_name("results", panel.name), caption, columns, rows))
    return Section(
        "headline",
        "Results",
        tables=tables,
        how="A difference is paired: the same examples, averaged over seeds. It is called higher or lower only when "
        "its interval excludes zero and the adjusted p is at most 0.05; anything else is no difference. "
        "Each row links to the records that it was made from.",
        empty="No finished evaluation among these records; only those with status done enter this table.",
    )


def accuracy(collection: Collection, figures: Figures) -> Section:
    """One figure per task and metric, the primary outcome first."""
    made: list[Figure] = []
    rows = []
    for panel in collection.panels.values():
        if panel.is_transfer:
            continue
        task = panel.name
        arms = [arm for arm in collection.arms.values() if task in arm.evaluations]
        named = [m for arm in arms for m in arm.evaluations[task][0].record["metrics"]]
        for metric in dict.fromkeys([panel.primary, *named]):
            having = [arm for arm in arms if all(metric in s.record["metrics"] for s in arm.evaluations[task])]
            percent = is_share([s for arm in having for s in arm.evaluations[task]], metric)
            dots = []
            for arm in having:
                interval, over, values = metric_interval(records_of(arm.evaluations[task]), metric)
                label = text.metric_text(interval.mean, percent=percent)
                dots.append(plots.Dot(arm.style, interval.mean, interval.low, interval.high, values, label))
                rows.append(
                    [
                        Cell(task, task),
                        Cell(metric, metric),
                        collection.key(arm.name),
                        Cell(label, interval.mean, href=origin(arm.evaluations[task])),
                        interval_cell(interval.low, interval.high, percent=percent),
                        _over(arm.evaluations[task], over, interval.num),
                        Cell(", ".join(text.metric_text(v, percent=percent) for v in values)),
                    ]
                )
            if dots:
                note = " (primary outcome)" if metric == panel.primary else ""
                figure = plots.dot_intervals(dots, axis=metric, percent=percent)
                made.append(figures.add(figure, f"{task}: {metric}{note}", "accuracy"))
    columns = (
        Column("task"),
        Column("metric"),
        Column("arm"),
        Column("mean", num=True),
        INTERVAL,
        Column("over"),
        Column("single seeds", wrap=True),
    )
    return Section(
        "accuracy",
        "Accuracy",
        figures=made,
        numbers=[Table("accuracy", "Every metric of every arm", columns, rows)] if rows else [],
        how="Large mark: mean. Line: 95 % interval over seeds, or over examples where there is one seed. "
        "Small ticks: single seeds. Scales differ between panels.",
        empty="No finished evaluation among these records.",
    )


def budget(collection: Collection, figures: Figures) -> Section:
    """Trained parameters, on a logarithmic axis, against the primary outcome of each task."""
    made, rows, base = [], [], collection.base()
    for panel in collection.panels.values():
        if panel.is_transfer:
            continue
        percent, metric = collection.is_percent(panel.name), panel.primary
        points, level = [], None
        for arm in collection.arms.values():
            if not (evaluations := arm.evaluations.get(panel.name)):
                continue
            interval, _, _ = metric_interval(records_of(evaluations), metric)
            size = None if arm.untrained else _size(arm, panel)
            num = size[0]["trainable"] if size is not None else 0
            if arm is base:
                level = interval.mean
            elif num > 0:
                points.append(plots.Point(arm.style, num, interval.mean, interval.low, interval.high))
            if arm is base or size is not None:
                rows.append(
                    [
                        Cell(panel.name, panel.name),
                        collection.key(arm.name),
                        trained(arm, panel),
                        Cell(text.metric_text(interval.mean, percent=percent), interval.mean, href=origin(evaluations)),
                        interval_cell(interval.low, interval.high, percent=percent),
                    ]
                )
        if points:
            figure = plots.budget(points, level=level, axis=metric, percent=percent)
            made.append(figures.add(figure, f"{panel.name}: {metric}", "budget"))
    columns = (
        Column("task"),
        Column("arm"),
        Column("trained parameters", num=True),
        Column("mean", num=True),
        INTERVAL,
    )
    return Section(
        "budget",
        "Budget and quality",
        figures=made,
        numbers=[Table("budget", "Trained parameters and the primary outcome", columns, rows)] if made else [],
        how="One mark per arm: how many parameters it trained (each line of the axis is a factor of ten) and its mean "
        "with the 95 % interval. Dashed: the base, which trains nothing. An arm that reuses another's runs has their number.",
        empty="No arm among these records has both a plan and a finished evaluation.",
    )


def interval_cell(low: float | None, high: float | None, *, percent: bool, signed: bool = False) -> Cell:
    """Return "[low, high]" with both values; empty without an interval."""
    return Cell(text.interval_text(low, high, percent=percent, signed=signed), (low, high))


def verdict_cell(word: str) -> Cell:
    """Return a verdict as a badge."""
    return Cell(word, word, look=VERDICTS.get(word, "found"))


def trained(arm: Arm, panel: Panel) -> Cell:
    """Return how many parameters an arm trains, and their share of the model."""
    if arm.untrained:
        return Cell("0", 0)
    found = _size(arm, panel)
    if found is None:
        return Cell("not recorded", None)
    facts, source = found
    share = f"{100 * facts['trainable'] / facts['total']:.2g} %" + (
        f", by {source.arm}" if source.arm != arm.name else ""
    )
    return Cell(f"{facts['trainable']:,} ({share})", facts["trainable"], href=origin([source]))


def _size(arm: Arm, panel: Panel) -> tuple[Mapping[str, Any], Source] | None:
    """Trained and total parameters, and the record that says so: a plan, else what an evaluation knows of its run.

    Of another engine, or of a merged model, there is no training record of that name.
    """
    planned = arm.plan(panel.model)
    if planned is not None:
        return planned.record["plan"], planned
    told = next((s for s in arm.evaluations.get(panel.name, []) if s.record.get("trained")), None)
    return None if told is None else (told.record["trained"], told)


def _over(evaluations: Sequence[Source], over: str, num: int) -> Cell:
    """What an interval ranges over: seeds, with all runs where each has several, or the examples of one run."""
    if over != "seeds":
        return Cell(f"{num:,} examples", look="soft")
    seeds = len({source.seed for source in evaluations})
    return Cell(f"{seeds} seeds" + (f", {len(evaluations)} runs" if len(evaluations) > seeds else ""), look="soft")


def _commonest(collection: Collection, panel: Panel) -> str:
    """What always giving the commonest answer would score, where the records say so."""
    found = [s for arm in collection.arms.values() for s in arm.evaluations.get(panel.name, [])]
    share = next((s.record["commonest"] for s in found if s.record.get("commonest") is not None), None)
    if share is None:
        return ""
    return f"; the commonest answer always: {text.metric_text(share, percent=collection.is_percent(panel.name))}"


def _difference(compared: Mapping[str, Any] | None, own: Sequence[Source], *, percent: bool) -> Sequence[Cell]:
    if compared is None:
        return [Cell(""), Cell(""), Cell("")]
    return [
        Cell(text.difference_text(compared["difference"], percent=percent), compared["difference"], href=origin(own)),
        interval_cell(compared["low"], compared["high"], percent=percent, signed=True),
        verdict_cell(compared["verdict"]),
    ]
