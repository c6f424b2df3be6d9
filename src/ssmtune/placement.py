"""Placement: recipes by name, and which components of an inventory they select."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from ssmtune.component import GROUPS, Component
from ssmtune.errors import ConfigError, PlacementError, nearest
from ssmtune.inventory import Inventory
from ssmtune.methods.base import Rows, get_method, method_names
from ssmtune.recipe import EVERY_PROJECTION, Edit, Recipe

TRANSFORMER_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The target list of transformer tutorials."""

CORE = Edit(method="core", select=("core",))
PLACEMENTS = {
    **{group: Edit(method="lora", select=(group,)) for group in EVERY_PROJECTION},
    "all": Edit(method="lora", select=EVERY_PROJECTION),
    "random": Edit(method="lora", select=EVERY_PROJECTION, share=0.5),
}
"""Where LoRA goes; each placement can be asked for with "+core"."""


def recipe_names() -> tuple[str, ...]:
    """Names of all recipes: the placements, and what the method files declare."""
    return tuple(_recipes())


def _recipes() -> Mapping[str, tuple[Edit, ...]]:
    placements = {name: (edit,) for name, edit in PLACEMENTS.items()}
    with_core = {f"{name}+core": (*edits, CORE) for name, edits in placements.items()}
    tutorial = {"transformer-names": (Edit(method="lora", modules=TRANSFORMER_NAMES),)}
    declared = {name: edits for method in method_names() for name, edits in get_method(method).recipes.items()}
    return {**placements, **with_core, **tutorial, **declared}


def named_recipe(
    name: str,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    scaling: str = "standard",
    init: str = "default",
    seed: int = 0,
    allow_unmatched: bool = False,
    without: tuple[str, ...] = (),
) -> Recipe:
    """Return the recipe of that name. Raises `ConfigError` naming the nearest.

    `rank`, `alpha`, `dropout`, `scaling`, `init` and `seed` go to every edit whose method has such an option and for which
    the recipe does not fix it; `scaling` and `init` are refused where no edit takes them. `seed` also draws a random
    placement.

    >>> [edit.method for edit in named_recipe("all+core").edits]
    ['lora', 'core']
    """
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(
            f"recipe {name!r} does not exist; {nearest(name, recipes)}. A YAML file can hold one of your own."
        )
    given = {"rank": rank, "alpha": alpha, "dropout": dropout, "scaling": scaling, "init": init, "seed": seed}
    edits, taken = [], set()
    for edit in recipes[name]:
        known = {field.name for field in fields(get_method(edit.method).Options)}
        options = {**{key: value for key, value in given.items() if key in known}, **edit.options}
        taken |= known - edit.options.keys()
        edits.append(replace(edit, options=options, seed=seed))
    for option, value, default in (("scaling", scaling, "standard"), ("init", init, "default")):
        if value != default and option not in taken:
            methods = ", ".join(sorted({edit.method for edit in edits}))
            raise ConfigError(
                f"{option} {value!r}: no edit of recipe {name!r} takes it (methods: {methods}). "
                "Leave it out; 'ssmtune methods' shows what each method takes."
            )
    return Recipe(name=name, edits=tuple(edits), allow_unmatched=allow_unmatched, without=without)


def select_components(
    inventory: Inventory, edit: Edit, *, allow_unmatched: bool, without: Sequence[str] = ()
) -> list[Component]:
    """Return the components that an edit selects, in model order, with those of `without` left out (`Recipe`).

    Raises `PlacementError` for an entry that matches nothing (with the nearest roles), for a role that the method
    cannot edit, and for one that is both selected and left out; `allow_unmatched` forgives module names that match
    nothing, never a whole empty selection.
    """
    method = get_method(edit.method)
    usable = [c for c in inventory.everything if method.allows(c)]
    chosen: list[Component] = []
    unmatched = []
    for entry in edit.select:
        found = _by_group_or_role(inventory, usable, entry, edit.method)
        # A model without attention is still adapted "all" over: an absent group of a named recipe is no mistake,
        # a group that is asked for alone is.
        if not found and not edit.if_present and (entry not in GROUPS or len(edit.select) == 1):
            unmatched.append(entry)
        chosen += found
    for name in edit.modules:
        found = [c for c in usable if c.rows is None and _module_name(c) == name]
        if not found:
            unmatched.append(name)
        chosen += found
    if unmatched and not (edit.modules and allow_unmatched and chosen):
        raise PlacementError(_unmatched_message(inventory, edit, unmatched, chosen))
    if edit.layers is not None:
        chosen = [c for c in chosen if c.layer in edit.layers]
    chosen = _leave_out(inventory, edit, usable, chosen, without)
    ordered = [c for c in inventory.everything if c in chosen]
    if edit.share < 1:
        kept = random.Random(f"placement-{edit.seed}").sample(ordered, max(1, round(edit.share * len(ordered))))
        ordered = [c for c in ordered if c in kept]
    if not ordered and not edit.if_present:
        raise PlacementError(
            f"edit {edit.method!r} selects no component of {inventory.model_type} "
            f"(select {list(edit.select)}, layers {edit.layers}). 'ssmtune inspect MODEL' lists roles and layers."
        )
    return ordered


def _leave_out(
    inventory: Inventory, edit: Edit, usable: Sequence[Component], chosen: list[Component], without: Sequence[str]
) -> list[Component]:
    """`chosen` without what `without` names; a tensor of which it names some rows is replaced by its other parts."""
    barred = []
    for entry in without:
        found = [c for c in inventory.everything if c.group == entry or is_below(c.role, entry)]
        if not found:
            known = sorted({c.role for c in inventory.everything})
            raise PlacementError(
                f"without {entry!r}: nothing in this {inventory.model_type} has that role; "
                f"{nearest(entry, [*known, *GROUPS])}. 'ssmtune inspect MODEL' lists every role."
            )
        barred += found
        if any(is_below(selected, entry) for selected in edit.select):
            raise PlacementError(
                f"without {entry!r}: the edit by {edit.method!r} selects {', '.join(edit.select)}, which it forbids. "
                "Take it out of one of the two."
            )
    kept: list[Component] = []
    for component in chosen:
        touching = [c for c in barred if c.path == component.path and touches(c.rows, component.rows)]
        if not touching:
            kept.append(component)
        elif component.rows is None and all(c.rows is not None for c in touching):
            others = [c for c in inventory.segments if c.path == component.path and c not in touching]
            if not all(c in usable for c in others):
                raise PlacementError(
                    f"without {', '.join(without)}: method {edit.method!r} edits {component.role} ({component.path}) "
                    "only as a whole, and some of its rows are left out. Select other roles."
                )
            kept += others
    return kept


def is_below(role: str, entry: str) -> bool:
    """Whether `entry` is the role or what it is a part of.

    >>> is_below("attn.q.bias", "attn.q"), is_below("attn.qk", "attn.q")
    (True, False)
    """
    return role == entry or role.startswith(f"{entry}.")


def touches(rows: Rows, other: Rows) -> bool:
    """Whether two selections of rows of one tensor have a row in common; None is all of them."""
    if rows is None or other is None:
        return True
    return any(a < d and c < b for a, b in rows for c, d in other)


def _by_group_or_role(inventory: Inventory, usable: Sequence[Component], entry: str, method: str) -> list[Component]:
    if entry in GROUPS:
        return [c for c in usable if c.group == entry and c.rows is None and not c.role.endswith(".bias")]
    if entry == "everything":
        return [c for c in usable if c.rows is None]
    if entry == "biases":
        return [c for c in usable if c.role.endswith(".bias") and c.rows is None]
    if entry == "allowed":
        if not usable:
            raise PlacementError(
                f"method {method!r} has nothing to edit in this {inventory.model_type}. It trains: "
                f"{get_method(method).summary} 'ssmtune inspect MODEL' lists every role."
            )
        return list(usable)
    either = entry.split("|")
    found = [c for c in usable if c.role in either]
    if not found and any(c.role in either for c in inventory.everything):
        allowed = ", ".join(sorted({c.role for c in usable}))
        raise PlacementError(
            f"role {entry!r} exists in this {inventory.model_type} but method {method!r} cannot edit it; "
            f"it can edit: {allowed or 'nothing here'}."
        )
    return found


def _module_name(component: Component) -> str:
    parts = component.path.split(".")
    return parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]


def _unmatched_message(inventory: Inventory, edit: Edit, unmatched: list[str], chosen: list[Component]) -> str:
    allows = get_method(edit.method).allows
    roles = sorted({c.role for c in inventory.everything if allows(c)})
    if not edit.modules:
        hints = "; ".join(f"{name!r}: {nearest(name, [*roles, *GROUPS])}" for name in unmatched)
        needs = get_method(edit.method).needs
        return (
            f"nothing in this {inventory.model_type} matches {hints}. {needs + ' ' if needs else ''}"
            "'ssmtune inspect MODEL' lists every role."
        )
    # Half a target list that matches is the failure nobody notices: show what would be adapted, layer by layer.
    paths = {c.path for c in chosen}
    rows = []
    for group in ("attention", "recurrent", "mlp"):
        members = [c for c in inventory.components if c.group == group and allows(c)]
        layers = {c.layer for c in members}
        reached = {c.layer for c in members if c.path in paths}
        if members:
            rows.append(
                f"  {group:<10} {sum(c.path in paths for c in members):>4} of {len(members):>4} sites, "
                f"{len(reached):>3} of {len(layers):>3} layers; roles: {', '.join(sorted({c.role for c in members}))}"
            )
    table = "\n".join(rows)
    return (
        f"{len(unmatched)} of {len(edit.modules)} target names match nothing in this {inventory.model_type}: "
        f"{', '.join(unmatched)}.\nWhat the names that match would adapt:\n{table}\n"
        f"Use --recipe all (or all+core) to reach every layer, or --allow-unmatched to go on with the names that match."
    )
