"""Maps of a report: which components a plan reaches, and how training on one task changes another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ssmtune.report import plots

GROUPS = ("attention", "recurrent", "mlp", "core", "conv", "norm", "embedding")
COVERAGE_SCALE = ((0.0, "#d5dae1"), (0.001, "#b4cfe8"), (1.0, "#1f6fb2"))
CHANGE_SCALE = ((0.0, "#b35806"), (0.25, "#f1a340"), (0.5, "#eceef1"), (0.75, "#74add1"), (1.0, "#2166ac"))
"""Orange is worse, blue is better: told apart with the common colour-vision deficiencies."""


@dataclass(frozen=True)
class Change:
    """One field of a transfer map: the change of `test` by training on `train`, and how it is written."""

    train: str
    test: str
    difference: float
    text: str


def groups_of(coverage: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the component groups of a plan's coverage, in the order in which they are always shown."""
    known = [group for group in GROUPS if any(row["group"] == group for row in coverage)]
    return known + sorted({row["group"] for row in coverage} - set(GROUPS))


def coverage_map(coverage: Sequence[Mapping[str, Any]]) -> Any:
    """Heat map of layers by component group: the share of sites that are adapted; blank where a layer has none."""
    groups = groups_of(coverage)
    layers = sorted({int(row["layer"]) for row in coverage})
    sites = {(row["group"], int(row["layer"])): (int(row["adapted"]), int(row["sites"])) for row in coverage}
    share: list[list[float | None]] = []
    words: list[list[str]] = []
    for group in groups:
        cells = [sites.get((group, layer), (0, 0)) for layer in layers]
        share.append([adapted / num if num else None for adapted, num in cells])
        words.append([f"layer {layer}, {group}: {a} of {n} sites" for layer, (a, n) in zip(layers, cells, strict=True)])
    figure = go.Figure()
    figure.add_heatmap(
        x=layers,
        y=groups,
        z=share,
        text=words,
        hovertemplate="%{text}<extra></extra>",
        zmin=0,
        zmax=1,
        colorscale=[list(stop) for stop in COVERAGE_SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
    )
    plots.finish(figure, height=82 + 26 * len(groups), x_title="layer", y_title=None)
    figure.update_xaxes(showgrid=False, dtick=max(1, len(layers) // 10), tick0=layers[0] if layers else 0)
    figure.update_yaxes(showgrid=False, autorange="reversed", ticksuffix="  ")
    return figure


def transfer_map(changes: Sequence[Change], *, reach: float) -> Any:
    """Heat map of training task by test task; `reach` is the change of the deepest colour, the same in all maps."""
    trained = list(dict.fromkeys(c.train for c in changes))
    tested = list(dict.fromkeys(c.test for c in changes))
    found = {(c.train, c.test): c for c in changes}
    fields = [[found.get((a, b)) for b in tested] for a in trained]
    figure = go.Figure()
    figure.add_heatmap(
        x=tested,
        y=trained,
        z=[[None if f is None else f.difference for f in row] for row in fields],
        text=[["" if f is None else f.text for f in row] for row in fields],
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertemplate="trained on %{y}, tested on %{x}: %{text}<extra></extra>",
        zmin=-reach,
        zmax=reach,
        colorscale=[list(stop) for stop in CHANGE_SCALE],
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
    )
    plots.finish(figure, height=92 + 50 * len(trained), x_title="tested on", y_title="trained on")
    figure.update_xaxes(showgrid=False, type="category")
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category", ticksuffix="  ")
    return figure
