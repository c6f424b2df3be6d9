"""The adapted projection in plain PyTorch.

Source: Hu et al., "LoRA", ICLR 2022, section 4.1, for the low-rank term.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.projection.spec import Activated, LowRank, Normed, Packed, Prologue, Weight, dense


def projection(
    x: torch.Tensor,
    weight_OI: Weight,
    bias_O: torch.Tensor | None,
    *,
    low_rank: LowRank | None,
    prologue: Prologue | None,
    residual: torch.Tensor | None,
    multiplier: float,
) -> torch.Tensor:
    """Return residual + multiplier * (p W^T + bias + scale (p A^T) B^T), p the prologue of x."""
    p = prepared(x, prologue)
    if isinstance(weight_OI, Packed):
        y: torch.Tensor = _PackedLinear.apply(p, weight_OI, bias_O)  # type: ignore[no-untyped-call]
    else:
        y = F.linear(p, weight_OI, bias_O)
    if low_rank is not None:
        dropped = F.dropout(p, low_rank.dropout)
        y = y + low_rank.scale * F.linear(F.linear(dropped, low_rank.A.to(p.dtype)), low_rank.B.to(p.dtype))
    y = y * multiplier
    return y if residual is None else residual + y


class _PackedLinear(torch.autograd.Function):
    """p W^T + bias, both frozen: autograd would keep the values of W, which are unpacked again instead."""

    @staticmethod
    def forward(ctx: Any, p: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(p, dense(weight).to(p.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return dy @ dense(ctx.weight).to(dy.dtype), None, None


def prepared(x: torch.Tensor, prologue: Prologue | None) -> torch.Tensor:
    """Return what the projection reads, [..., I]; an activation is computed in fp32 (fp64 for fp64) and rounded once."""
    if prologue is None:
        return x
    if isinstance(prologue, Normed):
        size = prologue.weight_D.shape[0] if prologue.size is None else prologue.size
        return gated_rms_norm(
            x, prologue.weight_D, prologue.gate, eps=prologue.eps, group_size=size, backend="reference"
        )
    first, up = x.chunk(2, dim=-1) if prologue.halves else (x, prologue.up)
    wide = first.to(torch.promote_types(x.dtype, torch.float32))
    value = _activate(wide, prologue)
    return (value if up is None else value * up).to(x.dtype)


def _activate(x: torch.Tensor, prologue: Activated) -> torch.Tensor:
    return F.silu(x) if prologue.activation == "silu" else F.relu(x).square()
