"""What training did: learning curves, coverage of the components, movement of the core, gates of branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssmtune.report import maps, plots, text
from ssmtune.report.arms import Collection, origin
from ssmtune.report.sections import Figure, Figures, Section
from ssmtune.report.sources import Source
from ssmtune.report.tables import Cell, Column, Table

CORE_TENSORS = ("A_log", "D", "dt_bias")
MAX_CURVE_ROWS = 12
"""Rows of a curve without evaluations in the table of curves; the figure has all points."""

Series = dict[str, dict[str, dict[int, list[Mapping[str, Any]]]]]
"""Tensor or block -> arm -> layer -> rows of single runs."""


def losses(collection: Collection, figures: Figures) -> Section:
    """Training and evaluation loss by step, means over runs."""
    made: list[Figure] = []
    rows = []
    for place in sorted({_place(s) for arm in collection.arms.values() for s in arm.train}):
        curves = []
        for arm in collection.arms.values():
            runs = [s for s in arm.train if _place(s) == place]
            histories = [[(p["step"], p["loss"]) for p in s.record.get("history") or []] for s in runs]
            evaluated = [[(p["step"], p["eval_loss"]) for p in s.record.get("eval_history") or []] for s in runs]
            train, evaluation = _mean_curve(histories), _mean_curve(evaluated)
            if train or evaluation:
                curves.append(plots.Curve(arm.style, train, evaluation))
                for step, *values in _curve_rows(train, evaluation):
                    cells = [Cell(text.number_text(v), v, href=origin(runs) if v is not None else "") for v in values]
                    step_cell = Cell(f"{step:,}", step)
                    rows.append([Cell(place, place), collection.key(arm.name), step_cell, *cells])
        if curves:
            made.append(figures.add(plots.loss_curves(curves), place, "loss"))
    columns = (
        Column("task"),
        Column("arm"),
        Column("step", num=True),
        Column("training loss", num=True),
        Column("evaluation loss", num=True),
    )
    return Section(
        "loss",
        "Learning curves",
        figures=made,
        numbers=[Table("loss", "Loss by step, mean over runs, in nats per token", columns, rows)] if rows else [],
        how="Thick line with marks: evaluation loss; thin line: training loss; both are means over runs. "
        "Lower is better, but a lower loss is not yet a better answer.",
        empty="No training record among these.",
    )


def _place(source: Source) -> str:
    return f"{source.model}: {source.task}" if source.model else source.task


def _curve_rows(
    train: Sequence[tuple[float, float]], evaluation: Sequence[tuple[float, float]]
) -> list[tuple[float, float | None, float | None]]:
    """At each evaluation: its loss and the last training loss until then; without evaluations, some training losses."""
    if not evaluation:
        stride = max(1, -(-len(train) // MAX_CURVE_ROWS))
        kept = [*train[::stride], *([train[-1]] if (len(train) - 1) % stride else [])]
        return [(step, loss, None) for step, loss in kept]
    return [(step, next((v for s, v in reversed(train) if s <= step), None), loss) for step, loss in evaluation]


def _mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over runs at the steps that every run has."""
    runs = [run for run in runs if run]
    if not runs:
        return []
    tables = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, float(np.mean([table[step] for table in tables]))) for step in steps]


def coverage(collection: Collection, figures: Figures) -> Section:
    """One map per arm: which component groups of which layers its plan adapts."""
    made, rows = [], []
    for arm in collection.arms.values():
        for model in dict.fromkeys(s.model for s in arm.train):
            run = arm.plan(model)
            if run is None or not run.record["plan"].get("coverage"):
                continue
            planned, name = run.record["plan"], f"{model}: {arm.name}" if model else arm.name
            groups = ", ".join(f"{group} {num:,}" for group, num in planned["groups"].items())
            note = f"{planned['trainable']:,} trainable: {groups}"
            made.append(figures.add(maps.coverage_map(planned["coverage"]), name, "coverage", note))
            for group in maps.groups_of(planned["coverage"]):
                rows.append([Cell(name, name), *_coverage_row(planned, group, origin([run]))])
    columns = (
        Column("arm"),
        Column("group"),
        Column("sites adapted", num=True, parts=("", "of")),
        Column("layers reached", num=True, parts=("", "of")),
        Column("which layers", wrap=True),
        Column("trained parameters", num=True),
    )
    return Section(
        "coverage",
        "Coverage by component",
        figures=made,
        numbers=[Table("coverage", "Sites that each plan adapts", columns, rows)] if rows else [],
        how="One column per layer, one row per component group. Dark blue: all sites adapted; pale blue: some; "
        "grey: none; blank: the layer has no such component.",
        empty="No training record with a plan among these.",
    )


def _coverage_row(planned: Mapping[str, Any], group: str, href: str) -> list[Cell]:
    layers = [row for row in planned["coverage"] if row["group"] == group]
    adapted, sites = sum(row["adapted"] for row in layers), sum(row["sites"] for row in layers)
    reached = [str(row["layer"]) for row in layers if row["adapted"]]
    trained = planned["groups"].get(group, 0)
    return [
        Cell(group, group),
        Cell(f"{adapted} of {sites}", (adapted, sites), href=href),
        Cell(f"{len(reached)} of {len(layers)}", (len(reached), len(layers))),
        Cell(", ".join(reached) or "none"),
        Cell(f"{trained:,}", trained),
    ]


def core(collection: Collection, figures: Figures) -> Section:
    """Movement of the core per layer and tensor, averaged over the runs of an arm, and a summary."""
    moved, styles, origins = _by_layer(collection, "core", "tensor")
    shares, deltas, rows, layers = [], [], [], []
    for tensor in [t for t in CORE_TENSORS if t in moved] + sorted(set(moved) - set(CORE_TENSORS)):
        arms = moved[tensor]
        share = {
            a: [(n, _mean(r, "moved"), _mean(r, "survives_bf16")) for n, r in sorted(arms[a].items())] for a in arms
        }
        delta = {a: [(n, _mean(r, "mean_abs_delta")) for n, r in sorted(arms[a].items())] for a in arms}
        shares.append(figures.add(plots.core_shares(share, styles), f"{tensor}: share of elements", "core-layers"))
        figure = plots.sizes_by_layer(delta, styles, axis="mean |change|")
        deltas.append(figures.add(figure, f"{tensor}: mean |change|", "core-layers"))
        for arm in arms:
            href = origins[arm]
            rows.append(_core_row(tensor, styles[arm], [row for layer in arms[arm].values() for row in layer], href))
            for (layer, share_moved, kept), (_, size) in zip(share[arm], delta[arm], strict=True):
                layers.append(
                    [
                        Cell(tensor, tensor),
                        _key(styles[arm]),
                        Cell(str(layer), layer),
                        Cell(text.metric_text(share_moved, percent=True), share_moved, href=href),
                        Cell(text.metric_text(kept, percent=True), kept),
                        Cell(text.number_text(size), size),
                    ]
                )
    columns = (
        Column("arm"),
        Column("tensor"),
        Column("elements per layer", num=True),
        Column("moved", num=True),
        Column("survives bf16", num=True),
        Column("mean |change|", num=True),
        Column("max |change|", num=True),
        Column("median horizon (tokens)", num=True, parts=("before", "after")),
    )
    by_layer = (Column("tensor"), Column("arm"), Column("layer", num=True), *columns[3:6])
    return Section(
        "core",
        "Movement of the core",
        tables=[Table("core", "Movement of the core, over all layers", columns, rows)] if rows else [],
        figures=shares + deltas,
        numbers=[Table("core-layers", "Movement of the core, layer by layer", by_layer, layers)] if rows else [],
        how="Filled marks: share of elements that training changed. Open marks: share whose change is still there "
        "after rounding to bfloat16; the rest would be lost in a bfloat16 export. Values are means over runs.",
        empty="No core tensor (A_log, D, dt_bias) was trained in these runs.",
    )


def _core_row(tensor: str, style: plots.Style, rows: Sequence[Mapping[str, Any]], href: str) -> list[Cell]:
    known = [(row["horizon_before"], row["horizon_after"]) for row in rows if row["horizon_before"] is not None]
    before, after = (float(v) for v in np.median(known, axis=0)) if known else (None, None)
    largest = max(float(row["max_abs_delta"]) for row in rows)
    moved, survives, mean = (_mean(rows, key) for key in ("moved", "survives_bf16", "mean_abs_delta"))
    return [
        _key(style),
        Cell(tensor, tensor),
        Cell(f"{rows[0]['num']:,}", rows[0]["num"]),
        Cell(text.metric_text(moved, percent=True), moved, href=href),
        Cell(text.metric_text(survives, percent=True), survives),
        Cell(text.number_text(mean), mean),
        Cell(text.number_text(largest), largest),
        Cell(f"{text.number_text(before)} to {text.number_text(after)}" if known else "", (before, after)),
    ]


def gates(collection: Collection, figures: Figures) -> Section:
    """How far the gates of branches opened, per block and layer, averaged over the runs of an arm."""
    found, styles, origins = _by_layer(collection, "gates", "block")
    made, rows = [], []
    for block, arms in sorted(found.items()):
        sizes = {a: [(n, _mean(layer, "mean_abs")) for n, layer in sorted(arms[a].items())] for a in arms}
        made.append(figures.add(plots.sizes_by_layer(sizes, styles, axis="mean |gate|"), f"{block}: gate", "gates"))
        for arm, layers in sizes.items():
            for layer, size in layers:
                value = Cell(text.number_text(size), size, href=origins[arm])
                rows.append([Cell(block, block), _key(styles[arm]), Cell(str(layer), layer), value])
    columns = (Column("block"), Column("arm"), Column("layer", num=True), Column("mean |gate|", num=True))
    return Section(
        "gates",
        "Gates of the branches",
        figures=made,
        numbers=[Table("gates", "Gates, layer by layer", columns, rows)] if rows else [],
        how="The factor of what a branch adds to its block's output, mean absolute value, 0 at the start: the layers "
        "in which it stays near 0 do not use their branch. What is added also has the size of B and C. "
        "Values are means over runs.",
    )


def _by_layer(collection: Collection, field: str, key: str) -> tuple[Series, dict[str, plots.Style], dict[str, str]]:
    """Rows by tensor or block, arm (with its model where there are several) and layer; each arm's style and origin."""
    found: Series = {}
    styles: dict[str, plots.Style] = {}
    origins: dict[str, str] = {}
    for arm in collection.arms.values():
        for source in arm.train:
            name = f"{source.model}: {arm.name}" if source.model else arm.name
            for row in source.record.get(field) or []:
                styles[name] = replace(arm.style, name=name)
                origins.setdefault(name, f"#{source.group}")
                found.setdefault(row[key], {}).setdefault(name, {}).setdefault(int(row["layer"]), []).append(row)
    return found, styles, origins


def _key(style: plots.Style) -> Cell:
    return Cell(style.name, style.name, colour=style.colour, glyph=style.glyph)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([float(row[key]) for row in rows]))
