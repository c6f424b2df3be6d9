"""`ssmtune tasks`: what a model can be trained on and scored by, from the task files."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from ssmtune.cli.output import make_table, print_result, print_table, tables


def tasks(
    data: Annotated[str | None, typer.Option(help="Directory with the sets; SSMTUNE_DATA by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print every fact of every task as JSON.")] = False,
) -> None:
    """List every task: kind, version, metrics, what guessing gives, which of its splits lie here, and its licence.

    Examples: [cyan]ssmtune tasks[/cyan] . [cyan]ssmtune tasks --data ~/data --json[/cyan]
    """
    rows = task_rows(data)
    if json_output:
        print_result({"tasks": rows})
        return
    headings = ("task", "version", "kind", "metric", "chance", "here", "licence")
    table = make_table("tasks", *headings, numbers=("version", "chance"), wrap=("here", "licence"))
    for row in rows:
        chance = "" if row["chance"] is None else f"{row['chance']:.1%}"
        here = "drawn" if row["drawn"] else " ".join(row["splits"]) or "-"
        table.add_row(
            row["name"], str(row["version"]), row["kind"], row["primary"] or "-", chance, here, escape(row["licence"])
        )
    print_table(table)
    tables().print(
        "drawn: made by ssmtune, needs no data. A set that is not here: docs/tasks.md says where it comes from.",
        highlight=False,
    )


def task_rows(directory: str | None) -> list[dict[str, Any]]:
    """Return the facts of each task as plain data, in the order of their names."""
    from ssmtune.tasks._sourced import SourcedTask
    from ssmtune.tasks.base import get_task, task_names

    rows = []
    for name in task_names():
        task = get_task(name)
        sourced = task if isinstance(task, SourcedTask) else None
        rows.append(
            {
                "name": name,
                "version": task.version,
                "kind": task.kind,
                "primary": task.primary,
                "metrics": list(task.metrics),
                "corpus_metrics": [] if sourced is None else list(sourced.corpus_metrics),
                "chance": task.chance,
                "stops": list(task.stops),
                "drawn": sourced is None,
                "splits": [] if sourced is None else sourced.found_splits(directory),
                "trained": sourced is None or sourced.trained,
                "tested": sourced is None or sourced.tested,
                "executes": sourced is not None and sourced.executes,
                "hub": None if sourced is None or sourced.hub is None else sourced.hub.path,
                "folder": None if sourced is None else sourced.folder,
                "licence": task.licence if sourced is None else sourced.terms,
            }
        )
    return rows
