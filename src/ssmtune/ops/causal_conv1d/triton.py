"""Depthwise causal convolution on NVIDIA GPUs, in Triton.

Reads any strides (a slice of in_proj's output stays where it is) and writes the input's layout.
The backward pass computes the pre-activations again from the inputs; nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.causal_conv1d.kernels import backward_kernel, forward_kernel


def causal_conv1d(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference's function with the reference's arguments, without an initial state; fp32 and bf16."""
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    mask = None
    if padding_mask is not None:
        batch, _, steps = x_BCT.shape
        mask = torch.ones(batch, steps, dtype=torch.int8, device=x_BCT.device)
        mask[:, steps - padding_mask.shape[-1] :] = padding_mask
    silu = activation is not None
    y: torch.Tensor = _Convolution.apply(x_BCT, weight_CK, bias_C, silu, seq, mask)  # type: ignore[no-untyped-call]
    return y


def _launch(x: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and block sizes; threads run along the dimension that is contiguous."""
    block_t, block_c = (32, 64) if x.stride(1) == 1 else (128, 16)
    batch, channels, steps = x.shape
    blocks = {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4}
    return (-(-steps // block_t), -(-channels // block_c), batch), blocks


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor [B, C, T], dense, with the contiguous dimension of `x`."""
    batch, channels, steps = x.shape
    if x.stride(1) == 1:
        return torch.empty(batch, steps, channels, dtype=dtype, device=x.device).transpose(1, 2)
    return torch.empty(batch, channels, steps, dtype=dtype, device=x.device)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, silu: bool, seq: Any, mask: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias, seq, mask)
        ctx.silu = silu
        y = _like(x, x.dtype)
        grid, blocks = _launch(x)
        forward_kernel[grid](
            x, weight, bias, seq, mask, y, x.shape[-1], x.shape[1], *x.stride(), *y.stride(), *weight.stride(),
            K=weight.shape[-1], SILU=silu, HAS_BIAS=bias is not None, HAS_SEQ=seq is not None,
            HAS_MASK=mask is not None, **blocks,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, seq, mask = ctx.saved_tensors
        grid, blocks = _launch(x)
        batch, channels, steps = x.shape
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx = _like(x, x.dtype)
        sums = (batch, grid[0], channels) if trains else (0,)
        dweight = torch.empty(*sums, weight.shape[-1], dtype=torch.float32, device=x.device)
        dbias = torch.empty(sums, dtype=torch.float32, device=x.device)
        backward_kernel[grid](
            x, weight, bias, seq, mask, dy, dx, dweight, dbias, steps, channels, *x.stride(), *dy.stride(),
            *dx.stride(), *weight.stride(), K=weight.shape[-1], SILU=ctx.silu, HAS_BIAS=bias is not None,
            HAS_SEQ=seq is not None, HAS_MASK=mask is not None, TRAINS=trains, **blocks,
        )  # fmt: skip
        return (
            dx,
            dweight.sum((0, 1)).to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.sum((0, 1)).to(bias.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
        )
