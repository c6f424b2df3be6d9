"""Bars of a benchmark: one group per component, one bar per side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from ssmtune.report import plots, text

PATTERNS = ("", "/", ".", "x")


def bars(sides: Mapping[str, Mapping[str, float]], *, axis: str) -> Any:
    """Horizontal bars, one group per entry and one bar per side, told by colour and hatching, values at their ends."""
    figure = go.Figure()
    entries = list(dict.fromkeys(entry for values in sides.values() for entry in values))
    colours = (plots.COLOURS[0], plots.BASE_COLOUR, plots.COLOURS[4], plots.COLOURS[2])
    for number, (name, values) in enumerate(sides.items()):
        having = [entry for entry in entries if entry in values]
        figure.add_bar(
            y=having,
            x=[values[entry] for entry in having],
            orientation="h",
            marker={"color": colours[number % len(colours)], "pattern": {"shape": PATTERNS[number % len(PATTERNS)]}},
            text=[f" {text.number_text(values[entry])}" for entry in having],
            textfont={"color": plots.INK, "size": 11},
            textposition="outside",
            textangle=0,
            cliponaxis=False,
        )
        plots.name_last(figure, name)
    num = sum(len(values) for values in sides.values())
    plots.finish(figure, height=110 + 20 * num + 12 * len(entries), x_title=axis, y_title=None)
    legend = {"orientation": "h", "x": 0, "xref": "container", "y": 1, "yref": "container", "yanchor": "top"}
    figure.update_layout(legend={**legend, "itemclick": False, "itemdoubleclick": False}, showlegend=True, margin_t=34)
    largest = max((v for values in sides.values() for v in values.values()), default=1.0) or 1.0
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(range=[0, 1.25 * largest], nticks=5)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticksuffix="  ")
    return figure
