"""`ssmtune inspect`: what a model is made of."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ssmtune.cli.output import layer_ranges, make_table, print_result, print_table, quiet_libraries, tables

COUNTS = ("tensors", "parameters", "share")


def inspect(
    model: Annotated[str, typer.Argument(help="Model directory, config .json, hub id, or a bundled model.")],
    quantize: Annotated[
        str | None, typer.Option(help="Show bytes with 4-bit projections: nf4, or a YAML file with a quantize block.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the inventory as JSON.")] = False,
) -> None:
    """Components by role, their parameters, and how each execution path uses them.

    Examples: [cyan]ssmtune inspect tiny-granite-h[/cyan] .
    [cyan]ssmtune inspect config.json --quantize nf4[/cyan]
    """
    quiet_libraries()
    from ssmtune.inventory import take_inventory
    from ssmtune.models import empty_model
    from ssmtune.probe import PATHS, probe
    from ssmtune.quantize import choose, read_quantize, summary

    empty = empty_model(model)
    inventory = take_inventory(empty)
    uses = probe(empty)
    four_bits = None
    if quantize is not None:
        config = read_quantize(quantize)
        four_bits = summary(choose(empty, config, inventory=inventory), config)
    if json_output:
        result = inventory.to_dict()
        if four_bits is not None:
            result["quantize"] = four_bits
        for component in result["components"]:
            component["uses"] = uses.of(component["path"])
        print_result(result)
        return
    if four_bits is not None:
        _print_bytes(model, four_bits)
        return
    title = f"{model}: {inventory.family}, {inventory.topology}, {inventory.total:,} parameters"
    table = make_table(
        title, "group", "role", "layers", "parameters", "shape", "used", numbers=("parameters",), wrap=("used",)
    )
    roles = list(dict.fromkeys((c.group, c.role) for c in inventory.components))
    for group, role in sorted(roles):
        members = [c for c in inventory.components if (c.group, c.role) == (group, role)]
        layers = {c.layer for c in members if c.layer is not None}
        used = {path: "/".join(sorted({uses.of(c.path)[path] for c in members})) for path in PATHS}
        same = len(set(used.values())) == 1
        table.add_row(
            group,
            role,
            f"{len(layers)} of {inventory.num_layers}" if layers else "",
            f"{sum(c.num_params for c in members):,}",
            ", ".join(sorted({"x".join(map(str, c.shape)) for c in members})),
            used[PATHS[0]] if same else ", ".join(f"{path} {use}" for path, use in used.items()),
        )
    print_table(table)
    tables().print(
        "How training, evaluation, prefill and decode use the tensor, in one word where they agree: CALL, its module is "
        "called; READ, the tensor itself is read; NONE, not at all. 'inspect --json' lists every tensor with its rows.\n"
    )
    table = make_table(
        "Coverage: every parameter is claimed once", "group", *COUNTS, "layers", numbers=COUNTS, wrap=("layers",)
    )
    for group in sorted({c.group for c in inventory.components}):
        inside = [c for c in inventory.components if c.group == group]
        num_params = sum(c.num_params for c in inside)
        counts = (str(len(inside)), f"{num_params:,}", f"{num_params / inventory.total:.2%}")
        table.add_row(group, *counts, layer_ranges(sorted({c.layer for c in inside if c.layer is not None})))
    print_table(table)


def _print_bytes(model: str, four_bits: dict[str, Any]) -> None:
    before, after = four_bits["bytes_before"], four_bits["bytes_after"]
    title = (
        f"{model}: {before / 1e6:,.1f} MB, {after / 1e6:,.1f} MB with {four_bits['parameters']:,} parameters in 4 bits"
    )
    headings = ("role", "tensors", "MB", "then", "reason to stay")
    table = make_table(title, *headings, numbers=headings[1:4], wrap=headings[-1:])
    for row in four_bits["roles"]:
        sizes = (f"{row[name] / 1e6:,.2f}" for name in ("bytes_before", "bytes_after"))
        table.add_row(row["role"], f"{row['tensors']:,}", *sizes, row["reason"])
    print_table(table)
    tables().print(
        "Weights alone, in the config's precision. 'components' of a quantize block chooses: groups, recurrent.in, "
        "recurrent.out, or roles."
    )
