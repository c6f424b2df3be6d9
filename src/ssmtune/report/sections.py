"""What a page is put together from: sections of figures, each with the table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import markupsafe
import plotly.io

from ssmtune.report.tables import Table

PLOT_CONFIG = {"displayModeBar": False, "responsive": True, "displaylogo": False}


@dataclass(frozen=True)
class Figure:
    """One figure; `table` is the name of the table that holds its numbers."""

    title: str
    html: markupsafe.Markup
    table: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """One example side by side: what was asked, what was expected, and each arm's answer with its score."""

    task: str
    metric: str
    number: str
    prompt: str
    expected: str
    answers: Sequence[tuple[Any, str, float]]


@dataclass(frozen=True)
class Section:
    """One section: words, tables, figures, then the figures' numbers folded away, and the samples.

    `empty` says what is missing where there is nothing to show; `how` how to read what is there.
    """

    name: str
    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    numbers: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    how: str = ""
    empty: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but the words."""
        return not (self.figures or self.samples or any(table.rows for table in (*self.tables, *self.numbers)))


@dataclass
class Figures:
    """Turns figures into HTML with ids that count up, so that the page does not change between runs."""

    count: int = field(default=0)

    def add(self, figure: Any, title: str, table: str, note: str = "") -> Figure:
        """Return `figure` under `title`, with the name of the table that holds its numbers."""
        self.count += 1
        html = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"plot-{self.count}",
            config=PLOT_CONFIG,
            default_height=f"{figure.layout.height}px",
        )
        return Figure(title, markupsafe.Markup(html), table, note)
