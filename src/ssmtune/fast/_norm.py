"""Root-mean-square norms outside the rewritten layers, on ssmtune's operation."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn

from ssmtune.ops.gated_rms_norm import gated_rms_norm

TOLERANCE = 1e-4
"""Relative: a norm in fp32 that rounds in another order differs by a few units in the last place; one that adds 1 to
its weight, or subtracts a mean, by tenths."""


def norm_shift(module: nn.Module) -> float | None:
    """Return c of a module that is (c + weight) * norm(x), 0 or 1, or None where it is neither; found by running it."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dim() != 1:
        return None
    # One that takes a gate as well is the mixer's.
    if weight.device.type == "meta" or "forward" in vars(module) or len(signature(module.forward).parameters) != 1:
        return None
    # A weight that no model has, in fp32, so that both round little; the module itself stays as it is.
    probe = torch.linspace(0.5, 1.5, weight.shape[0], device=weight.device)
    x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():
        found = torch.func.functional_call(module, {"weight": probe}, (x,))
        for shift in (0.0, 1.0):
            expected = gated_rms_norm(x, probe + shift, eps=eps)
            if found.shape == expected.shape and (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
                return shift
    return None


def norm_forward(module: Any, shift: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of such a module in one pass over memory."""
    eps = _eps(module)
    assert eps is not None

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        """(shift + weight) * norm(x)."""
        weight = module.weight
        if shift:
            # Not in bf16: beside 1 a small weight would lose its last digits.
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + shift
        return gated_rms_norm(hidden_states, weight, eps=eps)

    return forward


def _eps(module: nn.Module) -> float | None:
    found = vars(module).get("variance_epsilon", vars(module).get("eps"))
    return None if found is None else float(found)
