"""Gated root-mean-square normalisation in plain PyTorch.

Source: Dao and Gu, "Transformers are SSMs", ICML 2024, section 7 (the norm before the output projection), gate first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.ops.precision import outside_autocast


@outside_autocast
def gated_rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor, gate: torch.Tensor | None = None, *, eps: float, group_size: int
) -> torch.Tensor:
    """Return weight * norm(x * silu(gate)) [..., D] in the dtype of `x`; the mean square is taken over each group."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    value = x.to(dtype)
    if gate is not None:
        value = value * F.silu(gate.to(dtype))
    groups = value.reshape(*value.shape[:-1], -1, group_size)
    normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_D.to(dtype) * normed.flatten(-2)).to(x.dtype)
