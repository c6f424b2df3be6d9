"""`ssmtune report`: one HTML page from the records below a directory, or from a single record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import quiet_libraries, words


def report(
    directory: Annotated[
        Path, typer.Argument(help="A directory with records (a run, a study, a demo), or one record.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the directory, or beside the record.")
    ] = None,
    title: Annotated[str, typer.Option(help="The page's title.")] = "",
    tables: Annotated[
        Path | None, typer.Option(help="Write every table into this directory too, CSV and LaTeX.")
    ] = None,
) -> None:
    """Write one self-contained page: outcomes, comparisons, curves, coverage, checks, examples; or a benchmark.

    Examples: [cyan]ssmtune report demo[/cyan] . [cyan]ssmtune report records/bench/X.json[/cyan]
    """
    quiet_libraries()
    from ssmtune.records import find_records, read_record
    from ssmtune.report import write_report

    single = directory.is_file()
    found = {directory: read_record(directory)} if single else find_records(directory)
    stem = directory.name.split(".json")[0]
    page = out or (directory.with_name(f"{stem}.html") if single else directory / "report.html")
    write_report(found.values(), page, title or f"ssmtune: {stem}", paths=list(found), tables=tables)
    words.print(f"{page}: {len(found)} records.")
