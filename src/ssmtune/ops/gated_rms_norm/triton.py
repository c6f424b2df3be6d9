"""Gated root-mean-square normalisation on NVIDIA GPUs: one read of the inputs forward, one more backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_rms_norm.kernels import norm_back_kernel, norm_kernel
from ssmtune.ops.launch import launch

MAX_PROGRAMS = 1056
"""Programs of the backward pass where the weight trains: they keep its gradient while they walk over rows. 8 for each of
132 multiprocessors; more would only write more partial sums. Without it each row has its program."""


def gated_rms_norm(
    x: torch.Tensor, weight_D: torch.Tensor, gate: torch.Tensor | None = None, *, eps: float, group_size: int
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    y: torch.Tensor = _Norm.apply(x, weight_D, gate, eps, group_size)  # type: ignore[no-untyped-call]
    return y


def run_forward(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor | None, eps: float, size: int
) -> torch.Tensor:
    """Return the normed input, dense; no gradient is followed."""
    rows, gates = as_rows(x), None if gate is None else as_rows(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, width = rows.shape
    launch(norm_kernel, (num_rows, width // size),
        rows, gates, weight, y, num_rows, size, rows.stride(0), 0 if gates is None else gates.stride(0), width,
        eps, HAS_GATE=gate is not None, **_block(size),
    )  # fmt: skip
    return y


def run_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    size: int,
    *,
    trains: bool = False,
    again: bool = False,
    dgate: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of x, of the gate, with `trains` of the weight, fp32, and with `again` the forward's result.

    The gate's gradient is written into `dgate` where that is given; without a gate `added` is added to that of x.
    """
    assert gate is None or added is None
    rows, gates, upstream = as_rows(x), None if gate is None else as_rows(gate), as_rows(dy)
    others = None if added is None else as_rows(added)
    num_rows, width = rows.shape
    programs = min(num_rows, MAX_PROGRAMS) if trains else num_rows
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gate is not None and dgate is None:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    gate_grads = None if dgate is None else dgate.flatten(0, -2)
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device) if trains else None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if again else None
    launch(norm_back_kernel, (programs, width // size),
        rows, gates, weight, upstream, dx, gate_grads, dweight, y, others, num_rows, -(-num_rows // programs), size,
        *(0 if t is None else t.stride(0) for t in (rows, gates, upstream)), width,
        *(0 if t is None else t.stride(0) for t in (gate_grads, others)), eps,
        HAS_GATE=gate is not None, TRAINS=trains, AGAIN=again, ADDS=added is not None, **_block(size),
    )  # fmt: skip
    return dx, dgate, None if dweight is None else dweight.sum(0), y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, gate: Any, eps: float, size: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.eps, ctx.size = eps, size
        return run_forward(x, weight, gate, eps, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, gate = ctx.saved_tensors
        dx, dgate, dweight, _ = run_backward(dy, x, weight, gate, ctx.eps, ctx.size, trains=ctx.needs_input_grad[1])
        return dx, None if dweight is None else dweight.to(weight.dtype), dgate, None, None


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """[rows, D] with a contiguous last dimension; a view where the strides allow it (a slice of a projection's output)."""
    return (t if t.stride(-1) == 1 else t.contiguous()).flatten(0, -2)


def _block(size: int) -> dict[str, int]:
    block = int(triton.next_power_of_2(size))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
