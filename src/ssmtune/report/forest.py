"""The forest plot: paired differences with their intervals, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ssmtune.report import plots

NULL_COLOUR = "rgba(213,94,0,0.30)"


@dataclass(frozen=True)
class Effect:
    """One row of the forest plot: a paired difference with its interval."""

    label: str
    difference: float
    low: float
    high: float
    differs: bool
    text: str
    null: tuple[float, float] | None = None


def forest(effects: Sequence[Effect], *, axis: str, percent: bool) -> Any:
    """Paired differences with intervals, one row each; filled where a difference was found, open where it was not."""
    figure = go.Figure()
    # Differences of shares are points of a hundred, not shares.
    scale = 100.0 if percent else 1.0
    for effect in effects:
        colour = plots.COLOURS[0] if effect.differs else plots.BASE_COLOUR
        if effect.null is not None:
            band = {"color": NULL_COLOUR, "width": 15}
            figure.add_scatter(
                x=[scale * bound for bound in effect.null],
                y=[effect.label] * 2,
                mode="lines",
                line=band,
                hoverinfo="skip",
            )
        y = [effect.label, effect.label]
        figure.add_scatter(
            x=[scale * effect.low, scale * effect.high],
            y=y,
            mode="lines",
            line={"color": colour, "width": 2.5},
            hoverinfo="skip",
        )
        marker = {
            "color": colour,
            "size": 10,
            "symbol": "circle" if effect.differs else "circle-open",
            "line": {"width": 2, "color": colour},
        }
        figure.add_scatter(x=[scale * effect.difference], y=[effect.label], mode="markers", marker=marker)
        plots.name_last(figure, effect.text)
        figure.add_annotation(
            x=1,
            xref="paper",
            y=effect.label,
            text=effect.text.replace(", ", "<br>"),
            showarrow=False,
            xanchor="left",
            xshift=4,
            align="left",
            font={"size": 11},
        )
    plots.finish(figure, height=78 + 34 * len(effects), x_title=axis, y_title=None)
    longest = max((len(line) for e in effects for line in e.text.split(", ")), default=0)
    figure.update_layout(margin_r=12 + 7 * longest)
    bands = [bound for e in effects if e.null is not None for bound in e.null]
    low = scale * min(0.0, *(e.low for e in effects), *bands)
    high = scale * max(0.0, *(e.high for e in effects), *bands)
    room = (high - low) or 1.0
    figure.update_xaxes(range=[low - 0.06 * room, high + 0.06 * room], nticks=5)
    figure.update_yaxes(categoryorder="array", categoryarray=[e.label for e in reversed(effects)], showgrid=False)
    figure.update_yaxes(range=[-0.6, len(effects) - 0.4])
    figure.add_vline(x=0, line={"color": plots.BASE_COLOUR, "width": 1, "dash": "dash"})
    return figure
