"""Selection: which entries the sparse edits of a plan train, decided once and for all edits of a layer together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ssmtune.config import decode
from ssmtune.errors import PlacementError, TrainingFailed
from ssmtune.methods._sdt_choice import Member, choose_entries, size_of
from ssmtune.methods._sparse import Sparse
from ssmtune.methods.base import TensorEdit, get_method
from ssmtune.methods.sdt import DECAYS
from ssmtune.plan import Plan, Site

if TYPE_CHECKING:
    import torch


def sparse_edits(edits: Mapping[str, TensorEdit]) -> dict[str, Sparse]:
    """The sparse ones of a model's edits, by the key of their site."""
    return {key: edit for key, edit in edits.items() if isinstance(edit, Sparse)}


def choose_at_attach(plan: Plan, edits: Mapping[str, TensorEdit], weight_of: Callable[[Site], torch.Tensor]) -> None:
    """Choose the entries of every sparse edit whose selection needs no warm-up; `weight_of` gives a site's base tensor."""
    members = [m for m in _members(plan, edits) if m.options.selection != "warmup"]
    sites = {site.key: site for site in plan.sites}
    sizes = {m.key: size_of(m.role, weight_of(sites[m.key])) for m in members if m.options.selection == "magnitude"}
    put(edits, _choose(members, sizes))


def num_warmup_steps(plan: Plan, edits: Mapping[str, TensorEdit]) -> int:
    """Steps of the warm-up that the plan asks for, 0 where its entries need none.

    Raises `PlacementError` where no tensor of A is in the plan: there would be nothing to warm up.
    """
    waiting = [m for m in _members(plan, edits) if m.options.selection == "warmup"]
    if waiting and not any(m.role in DECAYS for m in waiting):
        roles = ", ".join(sorted({m.role for m in waiting}))
        raise PlacementError(
            f"recipe {plan.recipe!r}: selection 'warmup' ranks the channels by the change of A, and no tensor of A is in "
            f"the plan (its sparse roles: {roles}). Add {DECAYS[0]!r}, or choose selection 'random' or 'magnitude'."
        )
    return max((m.options.warmup_steps for m in waiting), default=0)


def begin_warm_up(plan: Plan, edits: Mapping[str, TensorEdit]) -> None:
    """Let the sparse edits train dense deltas where they decide or follow state by state, and nothing elsewhere."""
    found = sparse_edits(edits)
    for member in _members(plan, edits):
        found[member.key].warm_up(dense=member.options.part == "entries")


def choose_after_warm_up(plan: Plan, edits: Mapping[str, TensorEdit]) -> dict[str, torch.Tensor]:
    """Return the entries by key that the dense deltas of a warm-up rank highest; the edits are left as they are.

    Raises `TrainingFailed` naming a tensor of A that the warm-up did not move.
    """
    found = sparse_edits(edits)
    changes = {key: edit.dense.detach() for key, edit in found.items() if edit.dense is not None}
    members = _members(plan, edits)
    for member in members:
        if member.role in DECAYS and not bool(changes[member.key].any()):
            raise TrainingFailed(
                f"{member.key}: the warm-up did not move it, so nothing ranks its channels. "
                "Warm up for more steps (warmup_steps), or with a higher core_learning_rate."
            )
    return _choose(members, changes)


def put(edits: Mapping[str, TensorEdit], entries: Mapping[str, torch.Tensor]) -> None:
    """Let each sparse edit named in `entries` train those, from its deltas as they are."""
    found = sparse_edits(edits)
    for key, index in entries.items():
        found[key].choose(index)


def _members(plan: Plan, edits: Mapping[str, TensorEdit]) -> list[Member]:
    found = sparse_edits(edits)
    return [
        Member(
            key=site.key,
            role=site.role,
            shape=site.shape,
            layer=site.layer,
            options=decode(get_method(site.method).Options, site.options, where=f"plan, {site.path}"),
        )
        for site in plan.sites
        if site.key in found
    ]


def _choose(members: list[Member], evidence: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    chosen: dict[str, torch.Tensor] = {}
    ordered = sorted(members, key=lambda m: -1 if m.layer is None else m.layer)
    for _, layer in itertools.groupby(ordered, key=lambda m: m.layer):
        chosen.update(choose_entries(list(layer), evidence))
    return chosen
