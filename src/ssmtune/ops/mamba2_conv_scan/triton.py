"""Convolution and scan on NVIDIA GPUs; what came in is kept for the backward pass, and little else."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.causal_conv1d.triton import causal_conv1d
from ssmtune.ops.mamba2_chunk_scan.stages import shape_of
from ssmtune.ops.mamba2_chunk_scan.triton import Inputs, Into, run_backward, run_forward
from ssmtune.ops.mamba2_conv_scan.reference import split


def mamba2_conv_scan(
    xBC_BTC: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor | None,
    *,
    groups: int,
    state: int,
    D_H: torch.Tensor | None,
    dt_bias_H: torch.Tensor | None,
    dt_limit: tuple[float, float],
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    y: torch.Tensor = _ConvScan.apply(  # type: ignore[no-untyped-call]
        xBC_BTC, dt_BTH, A_H, conv_weight_CK, conv_bias_C, D_H, dt_bias_H, seq, groups, state, dt_limit
    )
    return y


class _ConvScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xBC: Any, dt: Any, A: Any, weight: Any, bias: Any, D: Any, dt_bias: Any, seq: Any, groups: int,
        state: int, limit: Any,
    ) -> torch.Tensor:  # fmt: skip
        ctx.sizes = A.shape[0], groups, state
        ctx.limit = limit
        x, B, C = split(_convolve(xBC, weight, bias, seq), *ctx.sizes)
        given = Inputs(x, dt, A, B, C, D, dt_bias, None, seq, None)
        y, _, small = run_forward(shape_of(x, B, True, limit), given)
        ctx.save_for_backward(xBC, dt, A, weight, bias, D, dt_bias, seq, *small)
        return y.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        xBC, dt, A, weight, bias, D, dt_bias, seq, step, decay, scores = ctx.saved_tensors
        read = [t for t in (xBC, weight, bias) if t is not None]
        needed = [ctx.needs_input_grad[i] for i, t in ((0, xBC), (3, weight), (4, bias)) if t is not None]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(needs) for t, needs in zip(read, needed, strict=True)]
            mixed = _convolve(leaves[0], leaves[1], None if bias is None else leaves[2], seq)
        x, B, C = split(mixed.detach(), *ctx.sizes)
        dmixed = torch.empty_like(mixed)
        into = Into(*split(dmixed, *ctx.sizes))
        ddt, dA, dD, ddt_bias, _ = run_backward(
            shape_of(x, B, True, ctx.limit),
            Inputs(x, dt, A, B, C, D, dt_bias, None, seq, None),
            (step, decay, scores),
            dy.contiguous().view(x.shape),
            None,
            into,
        )
        asked = [leaf for leaf, needs in zip(leaves, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(mixed, asked, dmixed) if asked else ())
        by_leaf = iter([next(found) if needs else None for needs in needed])
        dxBC, dweight, dbias = next(by_leaf), next(by_leaf), None if bias is None else next(by_leaf)
        return dxBC, ddt, dA, dweight, dbias, dD, ddt_bias, None, None, None, None


def _convolve(xBC: torch.Tensor, weight: torch.Tensor, bias: Any, seq: Any) -> torch.Tensor:
    """The convolution's output [B, T, C], channels last."""
    return causal_conv1d(xBC.transpose(1, 2), weight, bias, "silu", seq_idx=seq).transpose(1, 2)
