"""`ssmtune diff`: where two adapters differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ssmtune.cli.output import make_table, print_result, quiet_libraries, tables, words


def diff(
    a: Annotated[str, typer.Argument(help="A run directory, or an adapter directory.")],
    b: Annotated[str, typer.Argument(help="The one to compare it with.")],
    rows: Annotated[int, typer.Option(help="How many tensors to list, the furthest apart first.", min=1)] = 20,
    json_output: Annotated[bool, typer.Option("--json", help="Print every difference as JSON.")] = False,
) -> None:
    """Which sites of two adapters differ in plan, and how far apart their tensors are. Exits 0 when they are the same, else 1.

    Examples: [cyan]ssmtune diff runs/first runs/second[/cyan] .
    [cyan]ssmtune diff runs/first/checkpoints/checkpoint-10 runs/first --json[/cyan]
    """
    quiet_libraries()
    from ssmtune.adapters import diff_adapters

    result = diff_adapters(a, b)
    if json_output:
        print_result(result)
    elif result["identical"]:
        words.print(f"{a} and {b} are the same adapter: base, sites and every tensor, bit for bit.", markup=False)
    else:
        _show(result, rows)
    if not result["identical"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], num_rows: int) -> None:
    lines = [f"{name}: {values[0]} | {values[1]}" for name, values in result["facts"].items()]
    lines += [f"only in {side}: {key}" for side, name in (("A", "only_a"), ("B", "only_b")) for key in result[name]]
    lines += [f"{entry['site']}: {entry['differs']}" for entry in result["changed"]]
    for line in lines[:num_rows]:
        words.print(line, markup=False)
    if len(lines) > num_rows:
        words.print(f"... and {len(lines) - num_rows} more lines (--rows, --json)")
    found = result["tensors"]
    table = make_table(
        f"{len(found)} tensors differ", "tensor", "max |a-b|", "relative", numbers=("max |a-b|", "relative")
    )
    for row in found[:num_rows]:
        cells = ["-" if row[name] is None else f"{row[name]:.2e}" for name in ("max_abs", "relative")]
        table.add_row(row["tensor"].removeprefix("base_model.model."), *cells)
    if found:
        tables().print(table)
