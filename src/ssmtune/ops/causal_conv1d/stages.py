"""The two passes of the convolution over whole sequences: which kernels run, on what grid.

Where channels lie side by side, programs walk over time and read everything once (`rolling_kernels`); other layouts and
long filters go by tiles (`kernels`).
"""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.ops.causal_conv1d.kernels import backward_kernel, forward_kernel, gradient_kernel
from ssmtune.ops.causal_conv1d.rolling_back_kernels import rolling_conv_back_kernel
from ssmtune.ops.causal_conv1d.rolling_kernels import rolling_conv_kernel
from ssmtune.ops.launch import launch

ROLLING_TAPS = 4
"""The most taps whose windows fit in registers."""

FORWARD = {"STEPS": 16, "AHEAD": 4, "BLOCK_C": 256, "num_warps": 2}
BACKWARD = {"STEPS": 36, "AHEAD": 4, "BLOCK_C": 256, "num_warps": 2, "maxnreg": 128}
"""Steps that a program of the rolling kernels walks over, a multiple of those that it loads ahead, and its channels."""


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, silu: bool, seq: Any, mask: Any = None
) -> torch.Tensor:
    """Return the convolution from zeros, [B, C, T] with the contiguous dimension of `x`; no gradient is followed."""
    y = empty_like(x, x.dtype)
    arguments = (
        x, weight, bias, seq, mask, y, x.shape[-1], x.shape[1], *x.stride(), *y.stride(), *weight.stride(),
    )  # fmt: skip
    told = switches(weight, bias, silu, seq, mask)
    if _rolls(x, weight):
        launch(rolling_conv_kernel, _rolling_grid(x, FORWARD, FORWARD["STEPS"]), *arguments, **told, **FORWARD)
        return y
    grid, blocks = _tiles(x)
    launch(forward_kernel, grid, *arguments, **told, **blocks)
    return y


def run_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    silu: bool,
    seq: Any,
    into: torch.Tensor,
    mask: Any = None,
    padded: torch.Tensor | None = None,
    trains: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradient of x `into` [B, C, T], any strides; return those of weight and bias, fp32, empty unless `trains`.

    `padded` [B]: there is a window, whose share of the first steps is left to its own kernel.
    """
    batch, channels, steps = x.shape
    taps, rolls = weight.shape[-1], _rolls(x, weight)
    grid, blocks = _tiles(x)
    segment = BACKWARD["STEPS"] - (taps - 1) if rolls else blocks["BLOCK_T"]
    sums = (batch, -(-steps // segment), channels) if trains else (0,)
    dweight = torch.empty(*sums, taps, dtype=torch.float32, device=x.device)
    dbias = torch.empty(sums, dtype=torch.float32, device=x.device)
    told = switches(weight, bias, silu, seq, mask) | {"HAS_WINDOW": padded is not None}
    if rolls:
        launch(rolling_conv_back_kernel, _rolling_grid(x, BACKWARD, segment),
            x, weight, bias, seq, mask, padded, dy, into, dweight, dbias, steps, channels, *x.stride(), *dy.stride(),
            *into.stride(), *weight.stride(), TRAINS=trains, **told, **BACKWARD,
        )  # fmt: skip
    else:
        grad = empty_like(x, torch.float32)
        launch(gradient_kernel, grid,
            x, weight, bias, seq, mask, padded, dy, grad, steps, channels, *x.stride(), *dy.stride(), *grad.stride(),
            *weight.stride(), **told, **blocks,
        )  # fmt: skip
        launch(backward_kernel, grid,
            x, weight, seq, mask, grad, into, dweight, dbias, steps, channels, *x.stride(), *grad.stride(),
            *into.stride(), *weight.stride(), K=taps, HAS_SEQ=seq is not None, HAS_MASK=mask is not None, TRAINS=trains,
            **blocks,
        )  # fmt: skip
    return (dweight.sum((0, 1)), dbias.sum((0, 1))) if trains else (dweight, dbias)


def _tiles(x: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and block sizes; threads run along the dimension that is contiguous."""
    block_t, block_c = (32, 64) if x.stride(1) == 1 else (128, 16)
    batch, channels, steps = x.shape
    blocks = {"BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": 4}
    return (-(-steps // block_t), -(-channels // block_c), batch), blocks


def _rolls(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the rolling kernels serve; tiles do where time is contiguous, or taps are many."""
    return x.stride(1) == 1 and weight.shape[-1] <= ROLLING_TAPS


def _rolling_grid(x: torch.Tensor, settings: dict[str, int], segment: int) -> tuple[int, int]:
    """Blocks of channels of every segment of so many steps, and batch."""
    batch, channels, steps = x.shape
    return -(-channels // settings["BLOCK_C"]) * -(-steps // segment), batch


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor [B, C, T], dense, with the contiguous dimension of `x`."""
    batch, channels, steps = x.shape
    if x.stride(1) == 1:
        return torch.empty(batch, steps, channels, dtype=dtype, device=x.device).transpose(1, 2)
    return torch.empty(batch, channels, steps, dtype=dtype, device=x.device)


def switches(weight: torch.Tensor, bias: Any, silu: bool, seq: Any, mask: Any) -> dict[str, Any]:
    """What every kernel is told beside its tensors."""
    return {
        "K": weight.shape[-1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_SEQ": seq is not None,
        "HAS_MASK": mask is not None,
    }
