"""`ssmtune plan`: the explicit list of edits, before anything is allocated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import (
    layer_ranges,
    make_table,
    print_result,
    print_table,
    quiet_libraries,
    split_list,
    tables,
)


def plan(
    model: Annotated[str, typer.Argument(help="Model directory, config .json, hub id, or a bundled model.")],
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a YAML file that holds one.")] = "all+core",
    rank: Annotated[int, typer.Option(help="LoRA rank.", min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the factors' product is scaled by alpha / rank.")] = 32.0,
    scaling: Annotated[str, typer.Option(help="standard, alpha / rank, or rs, alpha / sqrt(rank).")] = "standard",
    init: Annotated[str, typer.Option(help="default, or pissa: start at the principal singular vectors.")] = "default",
    budget: Annotated[
        int | None, typer.Option(help="Trained parameters to fit the rank to; alpha / rank stays.", min=1)
    ] = None,
    without: Annotated[
        str, typer.Option(help="Roles or groups that no edit may touch, separated by commas: attn.q,attn.k.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of a random placement.")] = 0,
    allow_unmatched: Annotated[bool, typer.Option(help="Go on although target names match nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Which tensors a recipe edits and what that costs; refuses what cannot work. No weights are loaded.

    Examples: [cyan]ssmtune plan tiny-granite-h --recipe all+core[/cyan] .
    [cyan]ssmtune plan config.json --recipe attention --rank 8 --json[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import load_yaml
    from ssmtune.inventory import coverage_table, take_inventory
    from ssmtune.models import empty_model
    from ssmtune.placement import named_recipe
    from ssmtune.plan import make_plan
    from ssmtune.recipe import Recipe

    chosen: Recipe
    if recipe.endswith((".yaml", ".yml", ".json")) or Path(recipe).is_file():
        chosen = load_yaml(Recipe, recipe)
        chosen = replace(chosen, without=(*chosen.without, *split_list(without)))
    else:
        chosen = named_recipe(
            recipe,
            rank=rank,
            alpha=alpha,
            scaling=scaling,
            init=init,
            seed=seed,
            allow_unmatched=allow_unmatched,
            without=split_list(without),
        )
    empty = empty_model(model)
    inventory = take_inventory(empty)
    made = make_plan(empty, chosen, inventory=inventory, budget=budget)
    if json_output:
        print_result(made.to_dict())
        return
    share = made.trainable / made.total
    title = f"{made.model}, recipe {made.recipe}: {made.trainable:,} of {made.total:,} train ({share:.3%})"
    headings = ("role", "method", "layers", "sites", "parameters")
    table = make_table(title, *headings, numbers=("sites", "parameters"), wrap=("layers",))
    for role, method in dict.fromkeys((s.role, s.method) for s in made.sites):
        members = [s for s in made.sites if (s.role, s.method) == (role, method)]
        layers = sorted({s.layer for s in members if s.layer is not None})
        table.add_row(role, method, layer_ranges(layers), str(len(members)), f"{sum(s.num_params for s in members):,}")
    print_table(table)
    rows = coverage_table(inventory, {s.path for s in made.sites})
    reached = {s.layer for s in made.sites if s.layer is not None}
    tables().print(f"Layers with at least one adapted site: {len(reached)} of {inventory.num_layers}.")
    groups: dict[str, list[int]] = {}
    for row in rows:
        adapted, sites = groups.get(row["group"], (0, 0))
        groups[row["group"]] = [adapted + row["adapted"], sites + row["sites"]]
    parts = [f"{group} {adapted} of {sites}" for group, (adapted, sites) in sorted(groups.items())]
    tables().print(f"Tensors adapted: {', '.join(parts)}.")
    if made.budget is not None:
        fitted = made.budget
        fixed = f", {fitted.fixed:,} of them in edits of a fixed size" if fitted.fixed else ""
        tables().print(
            f"Budget {fitted.parameters:,}: size {fitted.size} trains {made.trainable:,}{fixed}; {fitted.left:,} are left."
        )
