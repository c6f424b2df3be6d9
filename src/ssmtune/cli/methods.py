"""`ssmtune methods`: what can be trained, from the method files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from ssmtune.cli.output import print_result, tables


def methods(
    json_output: Annotated[bool, typer.Option("--json", help="Print every fact of every method as JSON.")] = False,
) -> None:
    """List every method: what it trains, what that costs, whether it merges, and which families can take it.

    Example: [cyan]ssmtune methods --json[/cyan]
    """
    rows = method_rows()
    if json_output:
        print_result({"methods": rows})
        return
    everywhere = sorted({family for row in rows for family in row["families"]})
    console = tables()
    for row in rows:
        # Shapes are written in brackets, which are markup to rich.
        console.print(f"[bold]{row['name']}[/bold]  {escape(row['trains'])}")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", min_width=12)
        facts.add_column(overflow="fold")
        facts.add_row("parameters", escape(row["formula"]))
        facts.add_row("merges", f"{'yes' if row['mergeable'] else 'no'}; overhead: {escape(row['overhead'])}")
        facts.add_row("families", _in_words(row["families"], everywhere))
        if row["recipes"]:
            facts.add_row("recipes", escape(", ".join(row["recipes"])))
        facts.add_row("source", escape(row["source"]))
        console.print(Padding(facts, (0, 0, 1, 2)))
    console.print(f"{len(rows)} methods, {len(everywhere)} families. Options: ssmtune methods --json.")


def _in_words(families: list[str], everywhere: list[str]) -> str:
    """The families by name, or those that are missing where these are fewer."""
    missing = [name for name in everywhere if name not in families]
    if not missing:
        return f"all {len(everywhere)}"
    return f"all but {', '.join(missing)}" if len(missing) < len(families) else ", ".join(families)


def method_rows() -> list[dict[str, Any]]:
    """Return the facts of each method as plain data, in the order of their names."""
    # Imported here, so that printing help stays quick.
    import json
    from importlib import resources

    from ssmtune.methods.base import get_method, method_names

    # Which roles a family has is known from its models alone, and building those takes seconds.
    table = resources.files("ssmtune").joinpath("assets/method_families.json").read_text(encoding="utf-8")
    families = json.loads(table)
    rows = []
    for name in method_names():
        method = get_method(name)
        rows.append(
            {
                "name": name,
                "trains": method.summary,
                "formula": method.formula,
                "size_option": method.size_option,
                "mergeable": method.mergeable,
                "overhead": method.overhead,
                "options": asdict(method.Options()),
                "recipes": sorted(method.recipes),
                "families": families[name],
                "source": method.source,
            }
        )
    return rows
