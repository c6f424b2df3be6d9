"""Depthwise causal convolution on NVIDIA GPUs, in Triton.

Reads any strides (a slice of in_proj's output stays where it is) and writes the input's layout.
The backward pass computes the pre-activations again from the inputs, once; nothing else is kept.
A step for decoding is one kernel, which also shifts the window.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.causal_conv1d.reference import check_window
from ssmtune.ops.causal_conv1d.stages import empty_like, run_backward, run_forward, switches
from ssmtune.ops.causal_conv1d.step_kernels import step_kernel
from ssmtune.ops.causal_conv1d.window_kernels import window_back_kernel, window_kernel
from ssmtune.ops.launch import launch


def causal_conv1d(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state_BCK: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    if initial_state_BCK is not None:
        check_window(initial_state_BCK, weight_CK.shape[-1])
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    mask = None
    if padding_mask is not None:
        batch, _, steps = x_BCT.shape
        mask = torch.ones(batch, steps, dtype=torch.int8, device=x_BCT.device)
        mask[:, steps - padding_mask.shape[-1] :] = padding_mask
    silu, window = activation is not None, initial_state_BCK if weight_CK.shape[-1] > 1 else None
    y: torch.Tensor = _Convolution.apply(x_BCT, weight_CK, bias_C, window, silu, seq, mask)  # type: ignore[no-untyped-call]
    return y


def causal_conv1d_update(
    x_BCT: torch.Tensor,
    conv_state_BCK: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The reference's function with the reference's arguments, for one new step; no gradients."""
    batch, channels, _ = x_BCT.shape
    y = torch.empty(batch, channels, 1, dtype=x_BCT.dtype, device=x_BCT.device)
    launch(step_kernel, (-(-channels // 256), batch),
        x_BCT, conv_state_BCK, weight_CK, bias_C, y, channels, *x_BCT.stride()[:2], *conv_state_BCK.stride(),
        *weight_CK.stride(), K=weight_CK.shape[-1], LENGTH=conv_state_BCK.shape[-1], SILU=activation is not None,
        HAS_BIAS=bias_C is not None, BLOCK_C=256, num_warps=4,
    )  # fmt: skip
    return y


def _padded(window: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The steps of padding in front of each row's first real one [B]; None without a window."""
    if window is None:
        return None
    if mask is None:
        return torch.zeros(window.shape[0], dtype=torch.int32, device=window.device)
    return (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, window: Any, silu: bool, seq: Any, mask: Any) -> torch.Tensor:
        padded = _padded(window, mask)
        ctx.save_for_backward(x, weight, bias, window, seq, mask, padded)
        ctx.silu = silu
        y = run_forward(x, weight, bias, silu=silu, seq=seq, mask=mask)
        if window is not None:
            launch(window_kernel, (-(-x.shape[1] // 32), x.shape[0]),
                x, weight, bias, window, seq, mask, padded, y, x.shape[-1], x.shape[1], *x.stride(), *y.stride(),
                *weight.stride(), *window.stride(), **switches(weight, bias, silu, seq, mask), **_head(weight, 2),
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, bias, window, seq, mask, padded = ctx.saved_tensors
        batch, channels, steps = x.shape
        taps, trains = weight.shape[-1], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dwindow = empty_like(x, x.dtype), None
        dweight, dbias = run_backward(
            dy, x, weight, bias, silu=ctx.silu, seq=seq, into=dx, mask=mask, padded=padded, trains=trains
        )
        if window is not None:
            dwindow = torch.empty(window.shape, dtype=window.dtype, device=x.device)
            added = torch.empty(batch, channels, taps, dtype=torch.float32, device=x.device)
            added_bias = torch.empty(batch, channels, dtype=torch.float32, device=x.device)
            launch(window_back_kernel, (-(-channels // 32), batch),
                x, weight, bias, window, seq, mask, padded, dy, dx, dwindow, added, added_bias, steps, channels,
                *x.stride(), *dy.stride(), *dx.stride(), *weight.stride(), *window.stride(),
                **switches(weight, bias, ctx.silu, seq, mask), **_head(weight, 3),
            )  # fmt: skip
            if trains:
                dweight, dbias = dweight + added.sum(0), dbias + added_bias.sum(0)
        return (
            dx,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(bias.dtype) if ctx.needs_input_grad[2] else None,
            dwindow,
            None,
            None,
            None,
        )


def _head(weight: torch.Tensor, reaches: int) -> dict[str, int]:
    """Blocks of the kernels of the window: it, and as many inputs again or twice as many."""
    steps = triton.next_power_of_2(reaches * (weight.shape[-1] - 1))
    return {"BLOCK_T": steps, "BLOCK_C": 32, "num_warps": 1}
