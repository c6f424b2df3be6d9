"""The adapted projection on NVIDIA GPUs: cuBLAS for the products, Triton for what lies before them.

The low-rank term and the residual are added in one pass over the product; the low-rank input p A^T [..., r] is kept, the
prologue's result p is not, nor what a packed weight is unpacked to.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.launch import launch
from ssmtune.ops.precision import multiplies_exactly
from ssmtune.ops.projection.before import Spec, drop, prepare, prepare_back, through_dropout
from ssmtune.ops.projection.kernels import add_low_rank_kernel
from ssmtune.ops.projection.spec import Activated, LowRank, Normed, Prologue, Weight, dense

ADD_BLOCK = {"BLOCK_T": 32, "BLOCK_O": 128, "num_warps": 4}


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
    """The reference's function with the reference's arguments; fp32 and bf16."""
    second = norm_weight = None
    kind, halves, eps, size = "none", False, 0.0, 0
    if isinstance(prologue, Normed):
        kind, second, norm_weight, eps = "norm", prologue.gate, prologue.weight_D, prologue.eps
        size = norm_weight.shape[0] if prologue.size is None else prologue.size
    elif isinstance(prologue, Activated):
        kind, second, halves = prologue.activation, prologue.up, prologue.halves
    A = B = rounded_A = rounded_B = None
    scale = dropout = 0.0
    if low_rank is not None:
        A, B, scale, dropout, _ = low_rank
        rounded_A, rounded_B = rounded_factors(low_rank, x.dtype)
    # From the device's own generator, which a recomputed layer finds as the first computation found it, and left on the
    # device: nothing waits for it, and a recorded pass draws anew.
    seed = torch.randint(2**31, (1,), device=x.device) if dropout else None
    spec = Spec(kind, halves, eps, size, scale, multiplier, dropout)
    y: torch.Tensor = _Projection.apply(  # type: ignore[no-untyped-call]
        x, second, norm_weight, weight_OI, bias_O, A, B, residual, rounded_A, rounded_B, seed, spec
    )
    return y


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        second: Any,
        norm_weight: Any,
        weight: Any,
        bias: Any,
        A: Any,
        B: Any,
        residual: Any,
        rounded_A: Any,
        rounded_B: Any,
        seed: Any,
        spec: Spec,
    ) -> torch.Tensor:
        p = prepare(x, second, norm_weight, spec).flatten(0, -2)
        m = spec.multiplier
        if residual is not None and A is None:
            y = torch.addmm(residual.reshape(-1, weight.shape[0]), p, dense(weight).t(), alpha=m)
            y = y if bias is None else y.add_(bias, alpha=m)
        elif bias is not None:
            y = torch.addmm(bias, p, dense(weight).t(), alpha=m, beta=m)
        else:
            y = product(p, dense(weight).t(), m)
        v = None
        if A is not None:
            v = torch.mm(drop(p, seed, spec.dropout), rounded_A.t())
            # With the residual, which the product could take too, but only from a copy.
            add_low_rank(y, v, rounded_B.t(), m, residual)
        ctx.save_for_backward(x, second, norm_weight, rounded_A, rounded_B, v, seed)
        # The frozen weight is the model's own, outlives every pass, and nobody writes to it in between.
        ctx.weight, ctx.spec, ctx.lead = weight, spec, x.shape[:-1]
        return y.view(*ctx.lead, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, second, norm_weight, A, B, v, seed = ctx.saved_tensors
        weight, spec = ctx.weight, ctx.spec
        m = spec.multiplier
        flat = dy.reshape(-1, weight.shape[0])
        dA = dB = dv = None
        if A is not None:
            dv = torch.mm(flat, B)
            dB = fp32_product(flat.t(), v, m * spec.scale)
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dx = dsecond = p = None
        if needs_x:
            dp = product(flat, dense(weight), m)
            if dv is not None:
                _add_through_dropout(dp, dv, A, seed, spec)
            dx, dsecond, p = prepare_back(dp.view(*ctx.lead, -1), x, second, norm_weight, spec, again=A is not None)
        if dv is not None:
            p = prepare(x, second, norm_weight, spec) if p is None else p
            dA = fp32_product(dv.t(), drop(p.flatten(0, -2), seed, spec.dropout), m)
        return dx, dsecond, None, None, None, dA, dB, dy if ctx.needs_input_grad[7] else None, *(None,) * 4


def _add_through_dropout(dp: torch.Tensor, dv: torch.Tensor, A: torch.Tensor, seed: Any, spec: Spec) -> None:
    if seed is None:
        add_low_rank(dp, dv, A, spec.multiplier)
        return
    through_dropout(torch.mm(dv, A).mul_(spec.multiplier), dp, seed, spec.dropout)


def rounded_factors(low_rank: LowRank, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and scale * B in the products' dtype: rounded in advance where the caller did so, once for both passes."""
    if low_rank.rounded is not None and low_rank.rounded[0].dtype == dtype:
        return low_rank.rounded
    return low_rank.A.detach().to(dtype), (low_rank.B.detach() * low_rank.scale).to(dtype)


def rank_block(v: torch.Tensor) -> int:
    """Return the rank of a low-rank input [T, r] as tensor cores take it."""
    return max(16, int(triton.next_power_of_2(v.shape[1])))


def add_low_rank(
    y: torch.Tensor, v: torch.Tensor, factor: torch.Tensor, alpha: float, residual: torch.Tensor | None = None
) -> None:
    """y [T, O] += alpha v [T, r] factor [r, O] + residual [T, O], in place; y and v are dense."""
    rows, width = y.shape
    grid = int(triton.cdiv(width, ADD_BLOCK["BLOCK_O"])), int(triton.cdiv(rows, ADD_BLOCK["BLOCK_T"]))
    added = None if residual is None else residual.reshape(rows, width).contiguous()
    launch(
        add_low_rank_kernel, grid, y, v, factor, added, rows, width, v.shape[1], factor.stride(1), factor.stride(0),
        alpha, ADDS=added is not None, EXACT=multiplies_exactly(y), RANK=rank_block(v), **ADD_BLOCK,
    )  # fmt: skip


def fp32_product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """a b times a number in fp32: factors train in fp32, and their gradients are not rounded on the way."""
    product = torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    return product if factor == 1.0 else product.mul_(factor)


def product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """a b times a number, which the matrix product applies before it rounds."""
    if factor == 1.0:
        return torch.mm(a, b)
    unread = torch.empty((), dtype=a.dtype, device=a.device).expand(a.shape[0], b.shape[1])
    return torch.addmm(unread, a, b, beta=0, alpha=factor)
