"""What training on one task does to others: the transfer map, and forgetting against the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmtune.report import forest, maps, text
from ssmtune.report.arms import Arm, Collection, Compared, Panel, origin
from ssmtune.report.results import interval_cell, verdict_cell
from ssmtune.report.sections import Figure, Figures, Section
from ssmtune.report.sources import records_of
from ssmtune.report.tables import Cell, Column, Table
from ssmtune.study import metric_interval


def transfer(collection: Collection, compared: Compared, figures: Figures) -> Section:
    """One map per model and arm: training task by test task, the paired difference to the base in each field."""
    models = dict.fromkeys(panel.model for panel in collection.panels.values() if panel.is_transfer)
    panels = [panel for panel in collection.panels.values() if panel.model in models]
    names = {panel.name for panel in panels}
    reach = max((abs(c["difference"]) for (_, name), c in compared.items() if name in names), default=0.0) or 1.0
    made: list[Figure] = []
    rows = []
    for model in models:
        for arm in collection.arms.values():
            here = [p for p in panels if p.model == model and (arm.name, p.name) in compared and not arm.untrained]
            if not any(panel.is_transfer for panel in here):
                continue
            changes = []
            for panel in here:
                c = compared[arm.name, panel.name]
                percent = collection.is_percent(panel.name)
                words = text.difference_text(c["difference"], percent=percent)
                short = words if c["verdict"] in ("higher", "lower") else f"{words}<br>{c['verdict']}"
                changes.append(maps.Change(panel.trained_on, panel.evaluated_on, c["difference"], short))
                rows.append(
                    [
                        *([Cell(model, model)] if model else []),
                        collection.key(arm.name),
                        Cell(panel.trained_on, panel.trained_on),
                        Cell(panel.evaluated_on, panel.evaluated_on),
                        Cell(words, c["difference"], href=origin(arm.evaluations[panel.name])),
                        interval_cell(c["low"], c["high"], percent=percent, signed=True),
                        verdict_cell(c["verdict"]),
                    ]
                )
            title = f"{model}: {arm.name}" if model else arm.name
            made.append(figures.add(maps.transfer_map(changes, reach=reach), title, "transfer"))
    columns = (
        *([Column("model")] if any(models) else []),
        Column("arm"),
        Column("trained on"),
        Column("tested on"),
        Column("difference to base", num=True),
        Column("95 % interval", parts=("low", "high")),
        Column("verdict"),
    )
    return Section(
        "transfer",
        "Transfer",
        figures=made,
        numbers=[Table("transfer", "Training task by test task: the difference to the base", columns, rows)]
        if rows
        else [],
        how="Rows: the task trained on; columns: the task tested on; fields: the paired difference to the base on the "
        "tested task's primary outcome. Blue is better than the base, orange worse, both as deep as the largest change "
        "on this page; a field inside its interval says that no difference was found.",
    )


def forgetting(collection: Collection, compared: Mapping[str, Compared], figures: Figures) -> Section:
    """Every task that was not trained on: the difference to each base by its name, with solved examples or without."""
    made: list[Figure] = []
    rows = []
    for panel in (p for p in collection.panels.values() if p.is_transfer):
        percent = collection.is_percent(panel.name)
        for reference in (collection.arms[name] for name in compared):
            effects = []
            for arm in collection.arms.values():
                c = compared[reference.name].get((arm.name, panel.name))
                if c is None or arm.untrained:
                    continue
                differs = c["verdict"] in ("higher", "lower")
                words = text.difference_text(c["difference"], percent=percent)
                said = words if differs else f"{words}, {c['verdict']}"
                effects.append(forest.Effect(arm.name, c["difference"], c["low"], c["high"], differs, said))
                rows.append(_row(collection, panel, arm, reference, c))
            if effects:
                axis = "change (pp)" if percent else "change"
                figure = forest.forest(effects, axis=axis, percent=percent)
                made.append(figures.add(figure, f"{panel.name}, against {reference.name}", "forgetting"))
    columns = (
        Column("task"),
        Column("arm"),
        Column("score", num=True),
        Column("against"),
        Column("its score", num=True),
        Column("change", num=True),
        Column("95 % interval", parts=("low", "high")),
        Column("p (Holm)", num=True),
        Column("verdict"),
    )
    return Section(
        "forgetting",
        "Forgetting",
        figures=made,
        numbers=[Table("forgetting", "Tasks that were not trained on, against the bases", columns, rows)]
        if rows
        else [],
        how="Left of the dashed line: training on the task before the arrow made the model worse at the one behind it. "
        "A base that is shown solved examples is the harder reference: what it can do without any training.",
    )


def _row(collection: Collection, panel: Panel, arm: Arm, reference: Arm, c: Mapping[str, Any]) -> Sequence[Cell]:
    percent = collection.is_percent(panel.name)
    own, theirs = arm.evaluations[panel.name], reference.evaluations[panel.name]
    scores = [metric_interval(records_of(side), panel.primary)[0].mean for side in (own, theirs)]
    return [
        Cell(panel.name, panel.name),
        collection.key(arm.name),
        Cell(text.metric_text(scores[0], percent=percent), scores[0], href=origin(own)),
        collection.key(reference.name),
        Cell(text.metric_text(scores[1], percent=percent), scores[1], href=origin(theirs)),
        Cell(text.difference_text(c["difference"], percent=percent), c["difference"]),
        interval_cell(c["low"], c["high"], percent=percent, signed=True),
        Cell(text.p_text(c["p_holm"]), c["p_holm"]),
        verdict_cell(c["verdict"]),
    ]
