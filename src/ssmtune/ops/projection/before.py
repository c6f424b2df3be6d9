"""What lies before the products of a projection: norm, activation, dropout, and each one's way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ssmtune.ops.gated_rms_norm import triton as norm
from ssmtune.ops.launch import launch
from ssmtune.ops.projection.kernels import activate_back_kernel, activate_kernel, dropout_kernel

BLOCK = {"BLOCK": 1024, "num_warps": 4}


class Spec(NamedTuple):
    """What of a call is no tensor."""

    kind: str
    """"none", "norm", or an activation."""
    halves: bool
    eps: float
    size: int
    scale: float
    multiplier: float
    dropout: float


def prepare(x: torch.Tensor, second: Any, norm_weight: Any, spec: Spec) -> torch.Tensor:
    """What the projection reads, dense."""
    if spec.kind == "none":
        return x
    if spec.kind == "norm":
        return norm.run_forward(x, norm_weight, second, spec.eps, spec.size)
    first, up = _parts(x, second, spec)
    y = torch.empty(*x.shape[:-1], first.shape[-1], dtype=x.dtype, device=x.device)
    launch(activate_kernel, _grid(first),
        first, up, y, *first.shape, first.stride(0), 0 if up is None else up.stride(0), SILU=spec.kind == "silu",
        HAS_UP=up is not None, **BLOCK,
    )  # fmt: skip
    return y


def prepare_back(
    dp: torch.Tensor, x: torch.Tensor, second: Any, norm_weight: Any, spec: Spec, *, again: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of the gate or `up`, and with `again` what the projection reads, where it costs no read."""
    if spec.kind == "none":
        return dp, None, x
    if spec.kind == "norm":
        dx, dgate, _, p = norm.run_backward(dp, x, norm_weight, second, spec.eps, spec.size, again=again)
        return dx, dgate, p
    first, up = _parts(x, second, spec)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dsecond = None if second is None else torch.empty(second.shape, dtype=x.dtype, device=x.device)
    dfirst, dup = _parts(dx, dsecond, spec)
    y = torch.empty_like(dp) if again else None
    launch(activate_back_kernel, _grid(first),
        first, up, dp, dfirst, dup, y, *first.shape, first.stride(0), 0 if up is None else up.stride(0),
        dfirst.stride(0), 0 if dup is None else dup.stride(0), SILU=spec.kind == "silu", HAS_UP=up is not None,
        AGAIN=again, **BLOCK,
    )  # fmt: skip
    return dx, dsecond, y


def _parts(x: torch.Tensor, second: torch.Tensor | None, spec: Spec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is activated and what it is multiplied by, [rows, width] each, views with a contiguous last dimension."""
    rows = norm.as_rows(x)
    if spec.halves:
        width = rows.shape[1] // 2
        return rows[:, :width], rows[:, width:]
    return rows, None if second is None else norm.as_rows(second)


def drop(p: torch.Tensor, seed: torch.Tensor | None, rate: float) -> torch.Tensor:
    """What the low-rank term reads: the same elements dropped at every call with the same seed [1], all kept without one."""
    if seed is None:
        return p
    out, p = torch.empty_like(p), p.contiguous()
    launch(dropout_kernel, _blocks(p), p, out, seed, p.numel(), rate, ADD=False, **BLOCK)
    return out


def through_dropout(gradient: torch.Tensor, into: torch.Tensor, seed: torch.Tensor, rate: float) -> None:
    """Add to `into` what of a gradient passes the elements that were kept."""
    launch(dropout_kernel, _blocks(into), gradient, into, seed, into.numel(), rate, ADD=True, **BLOCK)


def _grid(first: torch.Tensor) -> tuple[int, int]:
    return first.shape[0], int(triton.cdiv(first.shape[1], BLOCK["BLOCK"]))


def _blocks(t: torch.Tensor) -> tuple[int]:
    return (int(triton.cdiv(t.numel(), BLOCK["BLOCK"])),)
