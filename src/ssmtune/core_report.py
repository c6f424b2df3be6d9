"""How far the core moved, and what that does to the recurrence's memory; gates of branches; ranks that were allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ssmtune.base_tensors import base_tensor, owner_of
from ssmtune.families.base import find_family
from ssmtune.inventory import take_inventory
from ssmtune.methods._adaptive import Adaptive
from ssmtune.models import weightless

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel

Rate = Callable[..., torch.Tensor]


def _selective(A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """exp(A_log) softplus(dt_bias), A_log [D], [D, N], [heads, P, N] or [1, 1, D, 1]; a head's dt may differ by channel (KDA)."""
    A_CN = A_log.flatten(0, -2) if A_log.dim() in (2, 3) else A_log.reshape(-1, 1)
    return A_CN.exp() * F.softplus(dt_bias.view(len(A_CN), -1))


def _real_part(log_A_real: torch.Tensor, log_dt: torch.Tensor) -> torch.Tensor:
    return (log_A_real + log_dt[:, None]).exp()


def _lru(Lambda: torch.Tensor, gate_bias: torch.Tensor) -> torch.Tensor:
    return 8 * F.softplus(Lambda) * gate_bias.flatten().sigmoid()


def _fixed(time_decay: torch.Tensor) -> torch.Tensor:
    return time_decay.exp()


RATES: Mapping[tuple[str, ...], Rate] = {
    ("ssm.A_log", "ssm.dt_bias"): _selective,
    ("gdn.A_log", "gdn.dt_bias"): _selective,
    ("ssm.log_A_real", "ssm.log_dt"): _real_part,
    ("lru.Lambda", "lru.recurrent_gate_bias"): _lru,
    ("rwkv.time_decay",): _fixed,
}
"""Roles of a layer -> rate at which its states decay per token where the input adds nothing, -log a, for each state."""


def describe_core(adapted: AdaptedModel) -> list[dict[str, Any]]:
    """Return one entry per core tensor of the plan: layer, tensor, elements, share moved, mean and largest |delta|.

    `survives_bf16` is the share of moved elements that still differ from the base after rounding to bf16.
    `horizon_before` and `horizon_after` are the median over the layer's states of tau, the tokens after which a state
    has decayed to 1/e where the input adds nothing: for A_log and dt_bias, tau = 1 / (exp(A_log) softplus(dt_bias)),
    before any limit on the step (`RATES` has the other recurrences); None for a layer without a decay of its own.
    """
    report = []
    with torch.no_grad():
        horizons = _horizons(adapted)
        for site in adapted.plan.sites:
            if site.group != "core":
                continue
            base, value = _base_and_value(adapted, site.path)
            delta = (value - base).abs()
            moved = delta > 0
            survives = (value.bfloat16() != base.bfloat16()) & moved
            num_moved = int(moved.sum())
            before, after = horizons.get(site.layer, (None, None))
            report.append(
                {
                    "layer": site.layer,
                    "tensor": site.path.rsplit(".", 1)[-1],
                    "num": value.numel(),
                    "moved": num_moved / value.numel(),
                    "mean_abs_delta": float(delta.mean()),
                    "max_abs_delta": float(delta.max()),
                    "survives_bf16": int(survives.sum()) / num_moved if num_moved else 0.0,
                    "horizon_before": before,
                    "horizon_after": after,
                }
            )
    return report


def describe_gates(adapted: AdaptedModel) -> list[dict[str, Any]]:
    """Return for each branch of the plan its layer, its block, and the mean and largest |gate|."""
    report = []
    for site in adapted.plan.sites:
        if site.container != "branch":
            continue
        gate = adapted.edits[site.key].trained()["gate"].detach().abs()
        sizes = {"mean_abs": float(gate.mean()), "max_abs": float(gate.max())}
        report.append({"layer": site.layer, "block": site.role.removeprefix("block."), **sizes})
    return report


def describe_ranks(adapted: AdaptedModel) -> list[dict[str, Any]]:
    """Return for each site whose rank was allocated in training its layer, role, name, initial rank, and rank."""
    report = []
    for site in adapted.plan.sites:
        edit = adapted.edits.get(site.key)
        if isinstance(edit, Adaptive):
            ranks = {"initial": edit.options.rank, "rank": edit.rank}
            report.append({"layer": site.layer, "role": site.role, "site": site.key, **ranks})
    return report


def _base_and_value(adapted: AdaptedModel, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor before and after its edit, both fp32; equal where it is not edited."""
    model = adapted.base_model.model
    owner, name = owner_of(model, path)
    return base_tensor(model, path).float(), getattr(owner, name).float()


def _horizons(adapted: AdaptedModel) -> dict[int | None, tuple[float, float]]:
    """Median tau of every layer with a decay of its own, before and after."""
    config = adapted.base_model.model.config
    inventory = take_inventory(weightless(config))
    needed = {role for roles in RATES for role in roles}
    paths = {(c.layer, c.role): c.path for c in inventory.components if c.role in needed}
    bound = find_family(config.model_type)[1].decay_bound(config.get_text_config())
    horizons = {}
    for layer in {layer for layer, _ in paths}:
        for roles, rate in RATES.items():
            if (layer, roles[0]) not in paths:
                continue
            pairs = [_base_and_value(adapted, paths[layer, role]) for role in roles]
            rates = [_bounded(values, bound) if bound else rate(*values) for values in zip(*pairs, strict=True)]
            before, after = (float((1 / found).median()) for found in rates)
            horizons[layer] = (before, after)
    return horizons


def _bounded(values: tuple[torch.Tensor, ...], bound: float) -> torch.Tensor:
    """The rate of a gate whose log decay is bound * sigmoid(exp(A_log) (input + dt_bias)), `bound` < 0."""
    A_log, dt_bias = values
    return -bound * (A_log.flatten().exp()[:, None] * dt_bias.view(A_log.numel(), -1)).sigmoid()
