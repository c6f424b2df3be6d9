"""Which tensors of the base a merge changes, and which rows of them it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ssmtune.adapter_files import discarded_paths
from ssmtune.errors import ConfigError, nearest
from ssmtune.inventory import take_inventory
from ssmtune.models import weightless
from ssmtune.placement import is_below, touches

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Plan


def edited_roles(plan: Plan) -> dict[str, str]:
    """Return the role of each tensor of the base that a merge changes, by the tensor's name."""
    dropped = discarded_paths(plan)
    return {s.path: s.role for s in plan.sites if not s.is_added and s.path not in dropped}


def restored_rows(adapted: AdaptedModel, roles: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """Return the rows of each edited tensor that are to be the base's again, for the components of these roles.

    Raises `ConfigError` for a role that no edit touches.
    """
    if not roles:
        return {}
    inventory = take_inventory(weightless(adapted.base_model.model.config))
    paths = edited_roles(adapted.plan)
    edited = {s.path: [o.rows for o in adapted.plan.sites if o.path == s.path] for s in adapted.plan.sites}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for role in roles:
        named = [c for c in (*inventory.components, *inventory.segments) if is_below(c.role, role)]
        found = [c for c in named if c.path in paths and any(touches(c.rows, rows) for rows in edited[c.path])]
        if not found:
            trained = sorted({site.role for site in adapted.plan.sites})
            raise ConfigError(
                f"restore {role!r}: no edit of this adapter touches it; {nearest(role, trained)}. Leave it out."
            )
        for component in found:
            ranges.setdefault(component.path, []).extend(component.rows or ((0, component.shape[0]),))
    return ranges


def give_back(value: torch.Tensor, base: torch.Tensor, rows: Sequence[tuple[int, int]]) -> None:
    """Put these rows of `base` into `value`, in place."""
    for first, end in rows:
        value[first:end] = base[first:end].float()
