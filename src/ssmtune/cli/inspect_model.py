"""`ssmtune inspect`: what a model is made of."""

from __future__ import annotations

from typing import Annotated

import typer

from ssmtune.cli.output import make_table, print_result, quiet_libraries, tables


def inspect(
    model: Annotated[str, typer.Argument(help="Model directory, config .json, hub id, or a bundled model.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the inventory as JSON.")] = False,
) -> None:
    """Components by role, their parameters, and how each execution path uses them.

    Example: [cyan]ssmtune inspect tiny-granite-h[/cyan]
    """
    quiet_libraries()
    from ssmtune.inventory import take_inventory
    from ssmtune.models import empty_model
    from ssmtune.probe import PATHS, probe

    empty = empty_model(model)
    inventory = take_inventory(empty)
    uses = probe(empty)
    if json_output:
        result = inventory.to_dict()
        for component in result["components"]:
            component["uses"] = uses.of(component["path"])
        print_result(result)
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
    tables().print(table)
    tables().print(
        "How training, evaluation, prefill and decode use the tensor: CALL, its module is called; READ, the tensor itself "
        "is read; NONE, not at all. 'inspect --json' lists every tensor with its row ranges."
    )
