"""The gated MLP on NVIDIA GPUs: the frozen products by cuBLAS, everything between them in one kernel each way.

Kept for the backward pass: x, the inner projection without its low-rank term, and the low-rank inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_mlp.kernels import gate_back_kernel, gate_kernel
from ssmtune.ops.gated_rms_norm import triton as norms
from ssmtune.ops.launch import launch
from ssmtune.ops.precision import multiplies_exactly
from ssmtune.ops.projection.spec import LowRank, Normed, Weight, dense
from ssmtune.ops.projection.triton import add_low_rank, fp32_product, product, rank_block, rounded_factors

FORWARD = {"BLOCK_T": 16, "BLOCK_K": 128, "STAGES": 3, "num_warps": 4}
BACK = {"BLOCK_T": 64, "BLOCK_K": 64, "STAGES": 2, "num_warps": 4}
"""Measured on an H200. In fp32, or with more than `MAX_SUMMED_RANK`, blocks do not fit into shared memory several times,
and nothing is loaded ahead."""
SHARES = 8
"""Of the rows, one program each: more would fill a GPU better and, backward, write more partial sums."""
MAX_SUMMED_RANK = 32
"""Sums for a higher rank do not fit into registers beside a tile; cuBLAS forms them then."""


def gated_mlp(
    x: torch.Tensor,
    norm: Normed,
    in_weight_2KD: Weight,
    out_weight_DK: Weight,
    in_low_rank: LowRank | None,
    out_low_rank: LowRank | None,
    multiplier: float,
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    assert in_low_rank is not None and out_low_rank is not None
    y: torch.Tensor = _Mlp.apply(  # type: ignore[no-untyped-call]
        x,
        norm.weight_D,
        in_weight_2KD,
        out_weight_DK,
        in_low_rank.A,
        in_low_rank.B,
        out_low_rank.A,
        out_low_rank.B,
        *rounded_factors(in_low_rank, x.dtype),
        *rounded_factors(out_low_rank, x.dtype),
        (norm.eps, in_low_rank.scale, out_low_rank.scale, multiplier),
    )
    return y


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        x, norm_weight, in_weight, out_weight, _, _, _, _, in_A, in_B, out_A, out_B, numbers = given
        eps, _, _, m = numbers
        flat = x.flatten(0, -2)
        p = norms.run_forward(flat, norm_weight, None, eps, norm_weight.shape[0])
        wide, v = torch.mm(p, dense(in_weight).t()), torch.mm(p, in_A.t())
        value = torch.empty(flat.shape[0], out_weight.shape[1], dtype=x.dtype, device=x.device)
        grid, tiles_each = _grid(value, FORWARD, SHARES)
        launch(
            gate_kernel, grid, wide, v, in_B, value, flat.shape[0], tiles_each, value.shape[1], v.shape[1],
            EXACT=multiplies_exactly(value), RANK=rank_block(v), **_ahead(FORWARD, value, v.shape[1]),
        )  # fmt: skip
        y = product(value, dense(out_weight).t(), m)
        out_v = torch.mm(value, out_A.t())
        add_low_rank(y, out_v, out_B.t(), m, flat)
        ctx.save_for_backward(x, norm_weight, in_A, in_B, out_A, out_B, wide, v, out_v)
        ctx.weights, ctx.numbers = (in_weight, out_weight), numbers
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, norm_weight, in_A, in_B, out_A, out_B, wide, v, out_v = ctx.saved_tensors
        in_weight, out_weight = ctx.weights
        eps, in_scale, out_scale, m = ctx.numbers
        flat = dy.reshape(-1, dy.shape[-1])
        out_dv = product(flat, out_B, m)
        d_out_B = fp32_product(flat.t(), out_v, m * out_scale)
        dvalue = product(flat, dense(out_weight), m)
        dwide, dv, d_in_B, d_out_A = _through_gate(wide, v, in_B, dvalue, out_dv, out_A)
        d_in_B = d_in_B if in_scale == 1.0 else d_in_B.mul_(in_scale)
        dp = torch.mm(dwide, dense(in_weight))
        add_low_rank(dp, dv, in_A, 1.0)
        rows = x.reshape(-1, x.shape[-1])
        dx, _, _, p = norms.run_backward(dp, rows, norm_weight, None, eps, norm_weight.shape[0], again=True, added=flat)
        assert p is not None
        d_in_A = fp32_product(dv.t(), p, 1.0)
        return dx.view(x.shape), None, None, None, d_in_A, d_in_B, d_out_A, d_out_B, *(None,) * 5


def _through_gate(
    wide: torch.Tensor,
    v: torch.Tensor,
    in_B: torch.Tensor,
    dvalue: torch.Tensor,
    out_dv: torch.Tensor,
    out_A: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the inner projection, of its low-rank input, and in fp32 of B inside, unscaled, and A outside."""
    (rows, width), rank, out_rank = dvalue.shape, v.shape[1], out_dv.shape[1]
    sums = max(rank, out_rank) <= MAX_SUMMED_RANK
    (blocks, shares), tiles_each = _grid(dvalue, BACK, SHARES if sums else rows)

    def fp32(*shape: int) -> torch.Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=wide.device) if sums else None

    dwide, value = torch.empty_like(wide), None if sums else torch.empty_like(dvalue)
    v_grad, dA, dB = fp32(blocks, rows, rank), fp32(shares, out_rank, width), fp32(shares, 2 * width, rank)
    launch(
        gate_back_kernel, (blocks, shares), wide, v, in_B, dvalue, out_dv, out_A, dwide, value, v_grad, dA, dB, rows,
        tiles_each, width, rank, out_rank, SUMS=sums, EXACT=multiplies_exactly(wide), RANK=rank_block(v),
        OUT_RANK=rank_block(out_dv), **_ahead(BACK, wide, max(rank, out_rank)),
    )  # fmt: skip
    if value is not None:
        return dwide, torch.mm(dwide, in_B), fp32_product(dwide.t(), v, 1.0), fp32_product(out_dv.t(), value, 1.0)
    assert v_grad is not None and dA is not None and dB is not None
    return dwide, v_grad.sum(0).to(wide.dtype), dB.sum(0), dA.sum(0)


def _ahead(blocks: dict[str, int], activations: torch.Tensor, rank: int) -> dict[str, int]:
    """The settings for these activations and this rank."""
    return blocks if not multiplies_exactly(activations) and rank <= MAX_SUMMED_RANK else blocks | {"STAGES": 1}


def _grid(value: torch.Tensor, blocks: dict[str, int], shares: int) -> tuple[tuple[int, int], int]:
    """Blocks of the width and shares of the rows, at most so many; and the tiles in a share."""
    tiles = int(triton.cdiv(value.shape[0], blocks["BLOCK_T"]))
    tiles_each = int(triton.cdiv(tiles, shares))
    return (int(triton.cdiv(value.shape[1], blocks["BLOCK_K"])), int(triton.cdiv(tiles, tiles_each))), tiles_each
