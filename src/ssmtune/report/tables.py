"""Tables of a report: what is shown, and the same as CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssmtune import records

Value = str | float | int | bool | None
Look = Literal["", "found", "quiet", "passed", "failed", "soft", "code"]

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{MINUS SIGN}": r"$-$",
    "\n": " ",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for a formula where a text begins with it."""


@dataclass(frozen=True)
class Column:
    """A heading; `num` aligns right, `wrap` breaks lines; `parts` are the CSV columns of a cell of several values."""

    title: str
    num: bool = False
    wrap: bool = False
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """What is written, its unrounded value (one, or one per part of its column), and where the number comes from."""

    text: str
    value: Value | tuple[Value, ...] = None
    href: str = ""
    look: Look = ""
    colour: str = ""
    glyph: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page: `name` is unique there, and is the name of its files."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def to_csv(self) -> str:
        """Return the values, unrounded, with a line of headings; text that a spreadsheet would run is quoted by '."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_safe(t) for c in self.columns for t in ([f"{c.title} {p}" for p in c.parts] or [c.title]))
        for row in self.rows:
            writer.writerow(v for c, cell in zip(self.columns, row, strict=True) for v in _values(c, cell))
        return stream.getvalue()

    def to_latex(self) -> str:
        """Return the texts as a booktabs table with its caption and label."""
        align = "".join("r" if column.num else "l" for column in self.columns)
        lines = [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{latex_text(self.caption)}}}",
            f"\\label{{tab:{self.name}}}",
            f"\\begin{{tabular}}{{{align}}}",
            "\\toprule",
            _latex_row(column.title for column in self.columns),
            "\\midrule",
            *(_latex_row(cell.text for cell in row) for row in self.rows),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
        return "\n".join(lines) + "\n"

    @property
    def links(self) -> list[tuple[str, str, str]]:
        """Kind, file name and data: address of each form that can be saved from the page."""
        forms = (("CSV", "csv", "text/csv", self.to_csv()), ("LaTeX", "tex", "application/x-tex", self.to_latex()))
        return [
            (kind, f"{self.name}.{suffix}", f"data:{media};charset=utf-8,{urllib.parse.quote(body)}")
            for kind, suffix, media, body in forms
        ]


def plain(*values: Value) -> list[Cell]:
    """Return cells that are written as they are."""
    return [Cell("" if value is None else str(value), value) for value in values]


def latex_text(text: str) -> str:
    """Return `text` with what LaTeX would take for a command escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def file_name(*words: str) -> str:
    """Return the words as one name of a file: lower case letters, digits and '-'."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") or "table"


def write_tables(tables: Iterable[Table], directory: Path) -> list[Path]:
    """Write each table as CSV and LaTeX into `directory` and return the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for suffix, body in ((".csv", table.to_csv()), (".tex", table.to_latex())):
            path = directory / f"{table.name}{suffix}"
            records.write_bytes(path, body.encode())
            written.append(path)
    return written


def _values(column: Column, cell: Cell) -> list[Value]:
    if column.parts:
        values = cell.value if isinstance(cell.value, tuple) else ()
        return [_safe(value) for value in (*values, *[None] * (len(column.parts) - len(values)))]
    return [_safe(cell.text if cell.value is None or isinstance(cell.value, tuple) else cell.value)]


def _safe(value: Value) -> Value:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _latex_row(texts: Iterable[str]) -> str:
    return " & ".join(latex_text(text) for text in texts) + r" \\"
