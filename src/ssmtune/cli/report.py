"""`ssmtune report`: one HTML page from the records below a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import quiet_libraries, words


def report(
    directory: Annotated[Path, typer.Argument(help="A directory with records: a run, a study, a demo.")],
    out: Annotated[Path | None, typer.Option(help="The page to write; DIRECTORY/report.html by default.")] = None,
    title: Annotated[str, typer.Option(help="The page's title.")] = "",
) -> None:
    """Write one self-contained page: outcomes with intervals, curves, coverage, movement of the core, checks.

    Example: [cyan]ssmtune report demo[/cyan]
    """
    quiet_libraries()
    from ssmtune.records import find_records
    from ssmtune.report import write_report

    found = find_records(directory)
    page = write_report(found, out or directory / "report.html", title or f"ssmtune: {directory.name}")
    words.print(f"{page}: {len(found)} records.")
