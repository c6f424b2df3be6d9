"""Convolution and scan on NVIDIA GPUs; what came in is kept for the backward pass, and little else."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.causal_conv1d import stages as convolution
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
        x, B, C = split(convolve(xBC, weight, bias, seq), *ctx.sizes)
        given = Inputs(x, dt, A, B, C, D, dt_bias, None, seq, None)
        y, _, small = run_forward(shape_of(x, B, True, limit), given)
        ctx.save_for_backward(xBC, dt, A, weight, bias, D, dt_bias, seq, *small)
        return y.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        xBC, dt, A, weight, bias, D, dt_bias, seq, *small = ctx.saved_tensors
        dxBC, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (xBC, dt))
        needs = ctx.needs_input_grad
        dA, dD, ddt_bias, dweight, dbias = conv_scan_backward(
            dy, xBC, dt, A, weight, bias, D, dt_bias, seq, small, ctx.sizes, ctx.limit, dxBC, ddt,
            trains=needs[3] or needs[4],
        )  # fmt: skip
        return (
            dxBC,
            ddt,
            dA,
            dweight.to(weight.dtype) if needs[3] else None,
            dbias.to(bias.dtype) if needs[4] else None,
            dD,
            ddt_bias,
            *(None,) * 4,
        )


def convolve(xBC: torch.Tensor, weight: torch.Tensor, bias: Any, seq: Any) -> torch.Tensor:
    """Return the convolution's output [B, T, C], channels last; no gradient is followed."""
    return convolution.run_forward(xBC.transpose(1, 2), weight, bias, silu=True, seq=seq).transpose(1, 2)


def conv_scan_backward(
    dy: torch.Tensor,
    xBC: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    weight: torch.Tensor,
    bias: Any,
    D: Any,
    dt_bias: Any,
    seq: Any,
    small: Any,
    sizes: tuple[int, int, int],
    limit: tuple[float, float],
    dxBC: torch.Tensor,
    ddt: torch.Tensor,
    *,
    trains: bool,
) -> tuple[torch.Tensor, Any, Any, torch.Tensor, torch.Tensor]:
    """Write the gradients of xBC and dt, any strides; return those of A, D, dt_bias, and with `trains` of the convolution."""
    mixed = convolve(xBC, weight, bias, seq)
    x, B, C = split(mixed, *sizes)
    dmixed = torch.empty_like(mixed)
    dA, dD, ddt_bias, _ = run_backward(
        shape_of(x, B, True, limit),
        Inputs(x, dt, A, B, C, D, dt_bias, None, seq, None),
        tuple(small),
        dy.contiguous().view(x.shape),
        None,
        Into(*split(dmixed, *sizes), ddt),
    )
    dweight, dbias = convolution.run_backward(
        dmixed.transpose(1, 2), xBC.transpose(1, 2), weight, bias, silu=True, seq=seq, into=dxBC.transpose(1, 2),
        trains=trains,
    )  # fmt: skip
    return dA, dD, ddt_bias, dweight, dbias
