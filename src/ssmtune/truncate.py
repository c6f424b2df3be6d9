"""Truncate: an adapted model with Hankel branches becomes one with branches of lower order, ready to be trained further.

Full order, truncation and fine-tuning of what is left are the three phases of the HRM adapter (Thapliyal 2026):
train `adapted`, then `adapted = truncate(adapted, eps=0.01)`, then train that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.attach import AdaptedModel, attach
from ssmtune.balanced_truncation import (
    System,
    balance,
    bound,
    choose_order,
    empirical_reachability,
    largest_error,
    observability,
    project,
    reachability,
    to_modes,
    to_schur,
)
from ssmtune.errors import ConfigError
from ssmtune.methods import hankel_reduced
from ssmtune.methods._branch import Branch
from ssmtune.methods._dynamics import ContinuousModes
from ssmtune.methods.hankel_reduced import ReducedOptions

if TYPE_CHECKING:
    from ssmtune.plan import Site

LARGEST_CONDITION = 1e6
"""Beyond it the modes of a reduced system cannot be told apart in fp32, and its matrix is kept."""


def truncate(
    adapted: AdaptedModel,
    *,
    rank: int | None = None,
    tol: float | None = None,
    eps: float | None = None,
    batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
) -> AdaptedModel:
    """Return a new adapted model on the same base whose Hankel branches are truncated; `adapted` is used up.

    One rule decides the order of every branch: `rank`, the largest error `tol` that its bound may allow, or the smallest
    Hankel singular value `eps` relative to the first. Gramians are exact; where `batches` of the model's inputs are
    given, directions are weighed by how these texts reach them, and no bound holds. The new plan carries each
    branch's order, bound and measured error; whatever else was trained keeps its values.
    Raises `ConfigError` where the plan has no such branch, or a reduced system would not be stable; nothing has changed then.
    """
    adapted._refuse_spent("truncate")
    sites = {s.key: s for s in adapted.plan.sites if _is_full(adapted, s)}
    if not sites:
        raise ConfigError(
            f"recipe {adapted.plan.recipe!r} has no Hankel branch of full order to truncate; it trains "
            f"{', '.join(sorted({s.method for s in adapted.plan.sites}))}. Attach and train one first (recipe 'hankel')."
        )
    reached = {} if batches is None else _reached(adapted, sites, batches)
    kept = {name: p.detach().clone() for name, p in adapted.trained_parameters().items()}
    reduced = {key: _reduce(site, adapted.edits[key], reached.get(key), rank, tol, eps) for key, site in sites.items()}
    plan = replace(
        adapted.plan,
        recipe=f"{adapted.plan.recipe}, truncated",
        sites=tuple(reduced[s.key][0] if s.key in reduced else s for s in adapted.plan.sites),
    )
    training = adapted.training
    base = adapted.detach()
    adapted.mark_spent("truncated")
    found = attach(base, plan)
    found.train(training)
    with torch.no_grad():
        for name, parameter in found.trained_parameters().items():
            key = name.rpartition(".")[0]
            value = reduced[key][1].trained()[name[len(key) + 1 :]] if key in reduced else kept[name]
            parameter.copy_(value)
    return found


def _is_full(adapted: AdaptedModel, site: Site) -> bool:
    edit: Any = adapted.edits.get(site.key)
    return isinstance(edit, Branch) and isinstance(edit.dynamics, ContinuousModes)


@torch.no_grad()
def system_of(branch: Any) -> System:
    """The system inside a branch as its steps apply it, without its gate, fp64 on the CPU."""
    wide = copy.deepcopy(branch).double().cpu()
    A, before_B = wide.dynamics.matrices()
    return System(A.detach(), (before_B @ wide.B).detach(), wide.C.detach())


def _reached(
    adapted: AdaptedModel, sites: Mapping[str, Site], batches: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The empirical reachability Gramian of each branch, over all tokens of `batches` that are not padding."""
    totals: dict[str, torch.Tensor] = {}
    numbers = dict.fromkeys(sites, 0)

    def watch(key: str) -> Any:
        def hook(branch: Any, given: tuple[torch.Tensor, ...]) -> None:
            states = branch.states(*given)
            mask = given[2] if len(given) > 2 else None
            flat = states.flatten(0, 1) if mask is None else states[mask != 0]
            summed = len(flat) * empirical_reachability(flat.double().cpu())
            totals[key] = totals[key] + summed if key in totals else summed
            numbers[key] += len(flat)

        return hook

    handles = [adapted.edits[key].register_forward_pre_hook(watch(key)) for key in sites]  # type: ignore[attr-defined]
    training = adapted.training
    try:
        with torch.no_grad():
            for batch in batches:
                adapted.eval()(**{**batch, "use_cache": False})
    finally:
        adapted.train(training)
        for handle in handles:
            handle.remove()
    if not totals:
        raise ConfigError("truncation on data: no batch was given. Give at least one, or leave batches out.")
    return {key: total / numbers[key] for key, total in totals.items()}


@torch.no_grad()
def _reduce(
    site: Site, branch: Any, reached: torch.Tensor | None, rank: int | None, tol: float | None, eps: float | None
) -> tuple[Site, Any]:
    """The site's plan after truncation, and a branch that holds the reduced values."""
    system = system_of(branch)
    sigma, W, T = balance(reachability(system) if reached is None else reached, observability(system))
    order = choose_order(sigma, rank=rank, tol=tol, eps=eps)
    small = project(system, W[:order], T[:, :order])
    if small.spectral_radius >= 1:
        raise ConfigError(
            f"{site.path}: truncated to order {order} the system is not stable (spectral radius "
            f"{small.spectral_radius:.6f}). Choose another order, or exact Gramians (no batches)."
        )
    options = ReducedOptions(
        order=order,
        num_pairs=0,
        gate="scalar" if branch.gate.numel() == 1 else "channel",
        full_order=len(sigma),
        bound=bound(sigma, order) if reached is None else None,
    )
    options, made = _realise(site, small, options)
    made.gate.copy_(branch.gate)
    options = replace(options, error=largest_error(system, system_of(made)))
    num_params = hankel_reduced.METHOD.num_params(site.shape, options)
    return replace(site, method="hankel_reduced", options=asdict(options), num_params=num_params), made


def _realise(site: Site, system: System, options: ReducedOptions) -> tuple[ReducedOptions, Any]:
    """The system as a branch: mode by mode, or as a matrix where its modes are too close to each other."""
    modal = to_modes(system)
    if modal.condition >= LARGEST_CONDITION:
        options = replace(options, form="matrix", num_pairs=0)
        system = to_schur(system)
        values = {"A": system.A, "B": system.B, "C": system.C}
    else:
        options = replace(options, num_pairs=len(modal.pairs))
        values = {
            "real": modal.real.atanh(),
            "radius": modal.pairs.abs().atanh(),
            "angle": modal.pairs.angle(),
            "B": modal.B,
            "C": modal.C,
        }
    assert hankel_reduced.METHOD.make_branch is not None
    made: Any = hankel_reduced.METHOD.make_branch(site.shape, options)
    for name, parameter in made.trained().items():
        if name in values:
            parameter.copy_(values[name])
    return options, made
