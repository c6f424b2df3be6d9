"""`ssmtune adapters`: what lies in adapter directories, with the hash that identifies each."""

from __future__ import annotations

from typing import Annotated

import typer

from ssmtune.cli.output import make_table, print_result, quiet_libraries, tables, words


def adapters(
    directories: Annotated[
        list[str], typer.Argument(help="Runs, adapter directories, or directories with some in them.")
    ],
    json_output: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List adapters: recipe, base, step, size and sha256. Exits 1 when one of them is damaged.

    Examples: [cyan]ssmtune adapters runs[/cyan] . [cyan]ssmtune adapters runs/first/checkpoints --json[/cyan]
    """
    quiet_libraries()
    from ssmtune.adapters import list_adapters

    entries = list_adapters(directories)
    if json_output:
        print_result(entries)
    else:
        headings = ("adapter", "recipe", "base", "step", "parameters", "kB", "sha256")
        table = make_table("", *headings, numbers=("step", "parameters", "kB"), wrap=("adapter",))
        for entry in entries:
            if entry["error"]:
                words.print(entry["error"], markup=False)
                continue
            table.add_row(
                entry["directory"],
                entry["recipe"],
                entry["base_digest"][:8],
                str(entry["step"]),
                f"{entry['trainable']:,}",
                f"{entry['bytes'] / 1000:,.0f}",
                entry["sha256"][:12],
            )
        tables().print(table)
    if any(entry["error"] for entry in entries):
        raise typer.Exit(1)
