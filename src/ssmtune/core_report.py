"""How far the core moved, and what that does to the recurrence's memory; how far the gates of branches opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ssmtune.attach import base_tensor, owner_of

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel


def describe_core(adapted: AdaptedModel) -> list[dict[str, Any]]:
    """Return one entry per core tensor of the plan: layer, tensor, elements, share moved, mean and largest |delta|.

    `survives_bf16` is the share of moved elements that still differ from the base after rounding to bf16.
    `horizon_before` and `horizon_after` are the median over heads of tau = 1 / (exp(A_log) softplus(dt_bias)), in
    tokens: after tau steps at zero input to dt, a state has decayed to 1/e.
    """
    report = []
    horizons: dict[int | None, tuple[float, float]] = {}
    with torch.no_grad():
        for site in adapted.plan.sites:
            if site.group != "core":
                continue
            if site.layer not in horizons:
                horizons[site.layer] = _horizons(adapted, site.path)
            base, value = _base_and_value(adapted, site.path)
            delta = (value - base).abs()
            moved = delta > 0
            survives = (value.bfloat16() != base.bfloat16()) & moved
            num_moved = int(moved.sum())
            before, after = horizons[site.layer]
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


def _base_and_value(adapted: AdaptedModel, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor before and after its edit, both fp32; equal where it is not edited."""
    model = adapted.base_model.model
    owner, name = owner_of(model, path)
    return base_tensor(model, path).float(), getattr(owner, name).float()


def _horizons(adapted: AdaptedModel, path: str) -> tuple[float, float]:
    parent = path.rsplit(".", 1)[0]
    A_log = _base_and_value(adapted, f"{parent}.A_log")
    dt_bias = _base_and_value(adapted, f"{parent}.dt_bias")
    before, after = (float((1 / (a.exp() * F.softplus(b))).median()) for a, b in zip(A_log, dt_bias, strict=True))
    return before, after
