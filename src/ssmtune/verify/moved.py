"""Every trained tensor moved away from where it started, element by element in the core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ssmtune.base_tensors import base_tensor
from ssmtune.merge import survival_report
from ssmtune.methods._adaptive import Adaptive
from ssmtune.methods._sparse import Sparse
from ssmtune.methods.base import get_method
from ssmtune.quantized import dense
from ssmtune.verify.base import Check, CheckResult, Subject

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site

SMALLEST_SHARE = 0.5
"""AdamW moves every element that has a gradient by about the learning rate, so in fp32 all of them move (measured:
100 %). In place in bf16 only elements below 2^-4 can: none of a standard dt_bias or D, a few percent of A_log."""


def _run(subject: Subject) -> CheckResult:
    """Measured: the smallest share of elements that moved among the core's tensors; limit: one half of each tensor.

    For tensors of low-rank adapters, where the factor that starts at random has no known start, the product must
    have changed the weight at all: share and limit are then those of tensors.
    """
    adapted = subject.adapted
    with torch.no_grad():
        survivals = survival_report(adapted)
        pruned = _pruned(adapted)
        low_rank = {s.path: s.changed for s in survivals if _has_factors(adapted, s.path) and s.path not in pruned}
        core = {
            site.key: _share_moved(adapted, site)
            for site in adapted.plan.sites
            if site.container != "module" and not _has_factors(adapted, site.path)
        }
    unmoved = [path for path, changed in low_rank.items() if changed == 0]
    lost = [path for path, share in core.items() if share < SMALLEST_SHARE]
    num_moved = len(low_rank) - len(unmoved)
    survives = {s.path: s.survives for s in survivals}
    parts = [f"{num_moved} of {len(low_rank)} low-rank sites changed their weight"] if low_rank else []
    if pruned:
        parts.append(f"{len(pruned)} more are pruned to rank 0")
    if core:
        sizes = {site.key: site.num_params for site in adapted.plan.sites if site.key in core}
        overall = sum(share * sizes[key] for key, share in core.items()) / sum(sizes.values())
        parts.append(f"{overall:.1%} of the core's elements moved")
    paths_of_core = {site.path for site in adapted.plan.sites if site.key in core}
    for label, paths in (("low-rank changes", set(low_rank)), ("core changes", paths_of_core)):
        kept = [survives[path] for path in sorted(paths) if path in survives]
        if kept:
            parts.append(f"{sum(kept) / len(kept):.1%} of the {label} survive rounding to bf16")
    measured = min(core.values()) if core else num_moved / max(len(low_rank), 1)
    return CheckResult(
        name="moved",
        ok=not unmoved and not lost,
        measured=measured if not unmoved else 0.0,
        limit=SMALLEST_SHARE if core else 1.0,
        where=_one_per_role(adapted, [*lost, *unmoved]),
        detail="; ".join(parts),
    )


def _has_factors(adapted: AdaptedModel, path: str) -> bool:
    return any(get_method(s.method).value_kind in ("factors", "composed") for s in adapted.plan.sites if s.path == path)


def _pruned(adapted: AdaptedModel) -> set[str]:
    """Tensors whose allocated rank is zero; none where no site has a rank, for then nothing was allocated or trained."""
    ranks: dict[str, int] = {}
    for site in adapted.plan.sites:
        edit = adapted.edits.get(site.key)
        if isinstance(edit, Adaptive):
            ranks[site.path] = ranks.get(site.path, 0) + edit.rank
    return {path for path, rank in ranks.items() if rank == 0} if any(ranks.values()) else set()


def _share_moved(adapted: AdaptedModel, site: Site) -> float:
    edit: Any = adapted.edits[site.key]
    if site.container == "branch":
        # B, C and the modes start at random: the gate's start is the only one that is known.
        return float((edit.gate != edit.start).float().mean())
    if site.container == "state":
        return float((edit() != 0).float().mean())
    base = dense(base_tensor(adapted.base_model.model, site.path))
    moved = edit(base) != base
    if isinstance(edit, Sparse):
        moved = moved.flatten()[edit.positions]
    return float(moved.float().mean())


def _one_per_role(adapted: AdaptedModel, paths: list[str]) -> str:
    """The first path of each role, so that every kind of tensor that failed is named."""
    roles = {name: site.role for site in adapted.plan.sites for name in (site.path, site.key)}
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(roles[path], path)
    return ", ".join(first.values())


CHECK = Check(proves="every trained tensor moved, and how much of that a bf16 export keeps", run=_run)
