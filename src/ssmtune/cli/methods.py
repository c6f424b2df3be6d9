"""`ssmtune methods`: what can be trained, from the method files."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.markup import escape

from ssmtune.cli.output import make_table, print_result, print_table, tables


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
    num_families = len({family for row in rows for family in row["families"]})
    headings = ("method", "trains", "parameters per site", "merges", "families")
    table = make_table(
        f"{len(rows)} methods, {num_families} families",
        *headings,
        numbers=("families",),
        wrap=("trains", "parameters per site"),
    )
    for row in rows:
        merges = "yes" if row["mergeable"] else "no"
        # Shapes are written in brackets, which are markup to rich.
        table.add_row(row["name"], escape(row["trains"]), escape(row["formula"]), merges, str(len(row["families"])))
    print_table(table)
    tables().print("Recipes, options, overhead, sources and the families by name: ssmtune methods --json.")


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
                "options": {field.name: field.default for field in fields(method.Options)},
                "recipes": sorted(method.recipes),
                "families": families[name],
                "source": method.source,
            }
        )
    return rows
