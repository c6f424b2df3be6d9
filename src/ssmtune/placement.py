"""Placement: recipes, and which components of an inventory they select."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import pydantic

from ssmtune.component import GROUPS, Component
from ssmtune.config import STRICT
from ssmtune.errors import ConfigError, PlacementError, nearest
from ssmtune.inventory import Inventory
from ssmtune.methods.base import get_method

TRANSFORMER_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The target list of transformer tutorials."""

PLACEMENTS = ("attention", "recurrent", "mlp", "all", "random")
PARTIAL = {"bitfit": "biases", "norm": "norm", "conv": "conv"}
"""Recipes of partial tuning and what each selects."""
STATES = {
    "initial-state": ("initial_state", "state.initial_state"),
    "state-offset-h": ("state_offset_h", "state.state_offset"),
    "state-offset-y": ("state_offset_y", "state.output_offset"),
}
"""Recipes of additions to the recurrence: method and what it selects."""
CONTROLS = ("control:core-discarded", "control:core-in-place")
RECIPES = (
    *(name + suffix for name in PLACEMENTS for suffix in ("", "+core")),
    "core",
    *PARTIAL,
    *STATES,
    "transformer-names",
    *CONTROLS,
)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Edit:
    """Apply `method` with `options` to every component that `select` names.

    `select` entries are groups ("attention"), roles ("ssm.in", "ssm.in.x") or "biases"; `modules` entries are module
    names as used in target lists ("q_proj"); `layers` restricts either; `share` draws that part of the selected sites at
    random.
    """

    method: str
    select: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    share: float = pydantic.Field(default=1.0, gt=0, le=1)
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A named placement and method: what a YAML file under `recipe:` holds."""

    name: str
    edits: tuple[Edit, ...]
    allow_unmatched: bool = False


def named_recipe(
    name: str,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    seed: int = 0,
    allow_unmatched: bool = False,
) -> Recipe:
    """Return the recipe of that name. Raises `ConfigError` naming the nearest.

    >>> [edit.method for edit in named_recipe("all+core").edits]
    ['lora', 'core']
    """
    if name not in RECIPES:
        raise ConfigError(
            f"recipe {name!r} does not exist; {nearest(name, RECIPES)}. A YAML file can hold one of your own."
        )
    low_rank = {"rank": rank, "alpha": alpha, "dropout": dropout}
    placement, _, core = name.removeprefix("control:").partition("+")
    edits = []
    if name == "transformer-names":
        edits.append(Edit(method="lora", modules=TRANSFORMER_NAMES, options=low_rank))
    elif name in PARTIAL:
        edits.append(Edit(method="partial", select=(PARTIAL[name],)))
    elif name in STATES:
        method, role = STATES[name]
        edits.append(Edit(method=method, select=(role,)))
    elif name in CONTROLS:
        edits.append(Edit(method="lora", select=("attention", "recurrent", "mlp"), options=low_rank))
    elif placement == "random":
        edits.append(
            Edit(method="lora", select=("attention", "recurrent", "mlp"), share=0.5, seed=seed, options=low_rank)
        )
    elif placement != "core":
        select = ("attention", "recurrent", "mlp") if placement == "all" else (placement,)
        edits.append(Edit(method="lora", select=select, options=low_rank))
    if core or placement == "core":
        edits.append(Edit(method="core", select=("core",)))
    if name == "control:core-discarded":
        edits.append(Edit(method="core", select=("core",), options={"saved": False}))
    if name == "control:core-in-place":
        edits.append(Edit(method="core_in_place", select=("core",)))
    return Recipe(name=name, edits=tuple(edits), allow_unmatched=allow_unmatched)


def select_components(inventory: Inventory, edit: Edit, *, allow_unmatched: bool) -> list[Component]:
    """Return the components that an edit selects, in model order.

    Raises `PlacementError` for an entry that matches nothing (with the nearest roles), and for a role that the
    method cannot edit; `allow_unmatched` forgives module names that match nothing, never a whole empty selection.
    """
    method = get_method(edit.method)
    usable = [c for c in inventory.everything if method.allows(c)]
    chosen: list[Component] = []
    unmatched = []
    for entry in edit.select:
        found = _by_group_or_role(inventory, usable, entry, edit.method)
        # A model without attention is still adapted "all" over: an absent group of a named recipe is no mistake,
        # a group that is asked for alone is.
        if not found and (entry not in GROUPS or len(edit.select) == 1):
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
    ordered = [c for c in inventory.everything if c in chosen]
    if edit.share < 1:
        kept = random.Random(f"placement-{edit.seed}").sample(ordered, max(1, round(edit.share * len(ordered))))
        ordered = [c for c in ordered if c in kept]
    if not ordered:
        raise PlacementError(
            f"edit {edit.method!r} selects no component of {inventory.model_type} "
            f"(select {list(edit.select)}, layers {edit.layers}). 'ssmtune inspect MODEL' lists roles and layers."
        )
    return ordered


def _by_group_or_role(inventory: Inventory, usable: Sequence[Component], entry: str, method: str) -> list[Component]:
    if entry in GROUPS:
        return [c for c in usable if c.group == entry and c.rows is None and not c.role.endswith(".bias")]
    if entry == "biases":
        return [c for c in usable if c.role.endswith(".bias") and c.rows is None]
    found = [c for c in usable if c.role == entry]
    if not found and any(c.role == entry for c in inventory.everything):
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
        return f"nothing in this {inventory.model_type} matches {hints}. 'ssmtune inspect MODEL' lists every role."
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
