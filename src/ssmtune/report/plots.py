"""Figures of the report: each function turns plain values into one plotly figure, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

BASE_COLOUR = "#808080"
COLOURS = ("#2f7fc1", "#d55e00", "#159a73", "#b5569a", "#b8860b", "#3aa6c9", "#7a5fc7")
"""Told apart with the common colour-vision deficiencies, and at least 3:1 on a white and on a near-black page."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
BASE_SYMBOLS = ("circle", "hexagon", "x")
GLYPHS = dict(
    zip(
        SYMBOLS,
        (
            "\N{BLACK CIRCLE}",
            "\N{BLACK SQUARE}",
            "\N{BLACK DIAMOND}",
            "\N{BLACK UP-POINTING TRIANGLE}",
            "\N{HEAVY GREEK CROSS}",
            "\N{BLACK STAR}",
            "\N{BLACK HEXAGON}",
            "\N{HEAVY MULTIPLICATION X}",
        ),
        strict=True,
    )
)
"""The marks as characters: an arm is told by its form too, never by its colour alone."""
INK, GRID = "#3a3f47", "rgba(128,128,128,0.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
MAX_POINTS = 300


@dataclass(frozen=True)
class Style:
    """How one arm is drawn, in every figure."""

    name: str
    colour: str
    symbol: str

    @property
    def glyph(self) -> str:
        """The arm's mark as a character, for text."""
        return GLYPHS[self.symbol]


def arm_styles(names: Sequence[str], bases: Sequence[str]) -> dict[str, Style]:
    """Return a style per arm: greys for the bases, the palette in order for the others."""
    others = [name for name in names if name not in bases]
    styles = {
        name: Style(name, COLOURS[i % len(COLOURS)], SYMBOLS[(i + 1) % len(SYMBOLS)]) for i, name in enumerate(others)
    }
    greys = {name: Style(name, BASE_COLOUR, BASE_SYMBOLS[i % len(BASE_SYMBOLS)]) for i, name in enumerate(bases)}
    return {name: (styles | greys)[name] for name in names}


@dataclass(frozen=True)
class Curve:
    """Mean loss over seeds of one arm: (step, loss) pairs of training and of evaluation."""

    style: Style
    train: Sequence[tuple[float, float]]
    evaluation: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """One mean with its interval, and the values of single seeds behind it."""

    style: Style
    mean: float
    low: float | None
    high: float | None
    values: Sequence[float]
    label: str


@dataclass(frozen=True)
class Point:
    """One arm of the budget figure: how many parameters it trains, and its mean with the interval."""

    style: Style
    num: int
    mean: float
    low: float | None
    high: float | None


def loss_curves(curves: Sequence[Curve]) -> Any:
    """Training loss (thin) and evaluation loss (thick, marked) against the step, labelled at the end of each line."""
    figure = go.Figure()
    ends = []
    for curve in curves:
        if curve.train:
            x, y = zip(*_thinned(curve.train), strict=True)
            figure.add_scatter(x=x, y=y, mode="lines", line={"color": curve.style.colour, "width": 1}, opacity=0.45)
            name_last(figure, f"{curve.style.name}, train")
        if curve.evaluation:
            x, y = zip(*curve.evaluation, strict=True)
            marker = {"symbol": curve.style.symbol, "size": 6, "color": curve.style.colour}
            line = {"color": curve.style.colour, "width": 2}
            figure.add_scatter(x=x, y=y, mode="lines+markers", line=line, marker=marker)
            name_last(figure, f"{curve.style.name}, evaluation")
        points = curve.evaluation or curve.train
        if points:
            ends.append((points[-1][0], points[-1][1], curve.style))
    finish(figure, height=300, x_title="step", y_title="loss (nats per token)")
    values = [y for curve in curves for _, y in (*curve.train, *curve.evaluation)]
    if values:
        _end_labels(figure, ends, span=(min(values), max(values)), height=300)
    return figure


def dot_intervals(dots: Sequence[Dot], *, axis: str, percent: bool) -> Any:
    """One row per arm: the mean (large), its interval (line), single seeds (small), the value written beside it."""
    figure = go.Figure()
    for dot in dots:
        colour, name = dot.style.colour, dot.style.name
        low = dot.mean if dot.low is None else dot.low
        high = dot.mean if dot.high is None else dot.high
        if len(dot.values) > 1:
            marker = {
                "color": colour,
                "size": 5,
                "opacity": 0.45,
                "symbol": "line-ns",
                "line": {"width": 1.5, "color": colour},
            }
            figure.add_scatter(x=list(dot.values), y=[name] * len(dot.values), mode="markers", marker=marker)
            name_last(figure, f"{name}, single seeds")
        figure.add_scatter(
            x=[low, high], y=[name, name], mode="lines", line={"color": colour, "width": 2.5}, hoverinfo="skip"
        )
        figure.add_scatter(
            x=[dot.mean], y=[name], mode="markers", marker={"color": colour, "size": 11, "symbol": dot.style.symbol}
        )
        name_last(figure, name)
        reach = max([high, *dot.values])
        figure.add_scatter(
            x=[reach], y=[name], mode="text", text=[f"  {dot.label}"], textposition="middle right", hoverinfo="skip"
        )
    finish(figure, height=78 + 34 * len(dots), x_title=axis, y_title=None)
    ends = [v for dot in dots for v in (dot.low, dot.high, dot.mean, *dot.values) if v is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = (high - low) or abs(high) or 1.0
    # The written value sits to the right of the last point and must not be cut.
    figure.update_xaxes(range=[low - 0.06 * room, high + 0.36 * room], nticks=6)
    if percent:
        # Plotly would also label what lies beyond 100 %, where only the written values are.
        step = next((s for s in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if room / s <= 5.5), 0.25)
        ticks = [k * step for k in range(math.ceil(max(low - 0.06 * room, 0.0) / step), int(1.0 / step + 1e-9) + 1)]
        digits = 0 if step >= 0.01 else 1
        figure.update_xaxes(tickvals=ticks, ticktext=[f"{100 * tick:.{digits}f}%" for tick in ticks])
    figure.update_yaxes(categoryorder="array", categoryarray=[d.style.name for d in reversed(dots)], showgrid=False)
    figure.update_yaxes(range=[-0.6, len(dots) - 0.4])
    return figure


def core_shares(rows: Mapping[str, Sequence[tuple[int, float, float]]], styles: Mapping[str, Style]) -> Any:
    """Per layer: the share of elements that moved (filled) and that still differ after rounding to bf16 (open)."""
    figure = go.Figure()
    ends = []
    prefix = (lambda name, word: f"{name} {word}") if len(rows) > 1 else (lambda name, word: word)
    for arm, points in rows.items():
        style = styles[arm]
        layers = [p[0] for p in points]
        for column, word, dash, suffix in ((1, "moved", "solid", ""), (2, "in bf16", "dot", "-open")):
            y = [p[column] for p in points]
            marker = {"symbol": style.symbol + suffix, "size": 7, "color": style.colour}
            line = {"color": style.colour, "width": 1.5, "dash": dash}
            figure.add_scatter(x=layers, y=y, mode="lines+markers", marker=marker, line=line, cliponaxis=False)
            name_last(figure, f"{arm}, {word}")
            ends.append((layers[-1], y[-1], replace(style, name=prefix(arm, word))))
    finish(figure, height=240, x_title="layer", y_title="share of elements")
    figure.update_yaxes(range=[-0.04, 1.06], tickformat=".0%", nticks=5)
    _end_labels(figure, ends, span=(-0.04, 1.06), height=240)
    return figure


def sizes_by_layer(rows: Mapping[str, Sequence[tuple[int, float]]], styles: Mapping[str, Style], *, axis: str) -> Any:
    """Per layer: one size of each arm, such as the mean absolute change of a core tensor, or of a branch's gates."""
    figure = go.Figure()
    ends = []
    for arm, points in rows.items():
        style = styles[arm]
        x, y = zip(*points, strict=True)
        marker = {"symbol": style.symbol, "size": 7, "color": style.colour}
        figure.add_scatter(x=x, y=y, mode="lines+markers", marker=marker, line={"color": style.colour, "width": 1.5})
        name_last(figure, arm)
        ends.append((x[-1], y[-1], style))
    finish(figure, height=240, x_title="layer", y_title=axis)
    top = max((y for points in rows.values() for _, y in points), default=1.0) or 1.0
    figure.update_yaxes(range=[0, 1.12 * top], exponentformat="e", nticks=5)
    _end_labels(figure, ends, span=(0.0, 1.12 * top), height=240)
    return figure


def budget(points: Sequence[Point], *, level: float | None, axis: str, percent: bool) -> Any:
    """Means with intervals against trained parameters on a logarithmic axis; `level` is the base, a dashed line."""
    figure = go.Figure()
    for point in points:
        colour, x = point.style.colour, point.num
        if point.low is not None and point.high is not None:
            line = {"color": colour, "width": 2.5}
            figure.add_scatter(x=[x, x], y=[point.low, point.high], mode="lines", line=line, hoverinfo="skip")
        marker = {"color": colour, "size": 11, "symbol": point.style.symbol}
        figure.add_scatter(x=[x], y=[point.mean], mode="markers", marker=marker)
        name_last(figure, point.style.name)
    finish(figure, height=300, x_title="trained parameters", y_title=axis)
    ends = [v for p in points for v in (p.low, p.high, p.mean) if v is not None]
    ends += [] if level is None else [level]
    room = (max(ends) - min(ends)) or abs(ends[0]) or 1.0
    span = (min(ends) - 0.06 * room, max(ends) + 0.06 * room)
    figure.update_yaxes(range=list(span), tickformat=".0%" if percent else None, nticks=6)
    small, large = (math.log10(pick(p.num for p in points)) for pick in (min, max))
    # A whole factor of ten at least, so that the axis has ticks to read.
    figure.update_xaxes(type="log", range=[math.floor(small - 0.05), math.ceil(large + 0.05)], dtick=1)
    if level is not None:
        figure.add_hline(y=level, line={"color": BASE_COLOUR, "width": 1.5, "dash": "dash"})
    _end_labels(figure, [(p.num, p.mean, p.style) for p in points], span=span, height=300)
    return figure


def name_last(figure: Any, name: str) -> None:
    """Give the trace added last a name, which hovering shows beside its values."""
    figure.data[-1].update(name=name, hovertemplate="%{x}, %{y}<extra>" + name + "</extra>")


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    stride = max(1, -(-len(points) // MAX_POINTS))
    return points[::stride]


def _end_labels(
    figure: Any, ends: Sequence[tuple[float, float, Style]], *, span: tuple[float, float], height: int
) -> None:
    """Write each mark and name right of its line's end, moved apart where two would overlap."""
    low, high = span
    gap = 16 / (height - 80) * ((high - low) or 1.0)
    ordered = sorted(ends, key=lambda end: end[1])
    placed: list[float] = []
    for _, y, _ in ordered:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    # Moved down again where the names would leave the figure at its top.
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], (placed[i + 1] - gap) if i + 1 < len(placed) else high)
    for (x, _, style), at in zip(ordered, placed, strict=True):
        font = {"color": style.colour, "size": 12}
        name = f"{style.glyph} {style.name}"
        figure.add_annotation(
            x=1, xref="paper", y=at, text=name, showarrow=False, xanchor="left", xshift=4, font=font, name=f"end {x}"
        )
    longest = max((len(end[2].name) for end in ends), default=0)
    figure.update_layout(margin_r=30 + 8 * longest)


def finish(figure: Any, *, height: int, x_title: str | None, y_title: str | None) -> None:
    """Give `figure` the look that all figures share: no colours of the page's own, room for labels, no dragging."""
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        showlegend=False,
        dragmode=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        hovermode="closest",
    )
    axis = {"gridcolor": GRID, "zeroline": False, "fixedrange": True, "automargin": True, "ticks": ""}
    figure.update_xaxes(**axis, title={"text": x_title, "standoff": 8})
    figure.update_yaxes(**axis, title={"text": y_title, "standoff": 8})
