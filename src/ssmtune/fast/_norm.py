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


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module is weight * norm(x), found by running it: by name, norms that add 1 to the weight fit too."""
    weight, eps = module._parameters.get("weight"), _eps(module)
    if "RMSNorm" not in type(module).__name__ or weight is None or eps is None or weight.dim() != 1:
        return False
    # One that takes a gate as well is the mixer's.
    if weight.device.type == "meta" or "forward" in vars(module) or len(signature(module.forward).parameters) != 1:
        return False
    # A weight that no model has, in fp32, so that both round little; the module itself stays as it is.
    probe = torch.linspace(0.5, 1.5, weight.shape[0], device=weight.device)
    x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():
        found = torch.func.functional_call(module, {"weight": probe}, (x,))
        expected = gated_rms_norm(x, probe, eps=eps)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def norm_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of such a module in one pass over memory."""
    eps = _eps(module)
    assert eps is not None

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        """weight * norm(x)."""
        return gated_rms_norm(hidden_states, module.weight, eps=eps)

    return forward


def _eps(module: nn.Module) -> float | None:
    found = vars(module).get("variance_epsilon", vars(module).get("eps"))
    return None if found is None else float(found)
