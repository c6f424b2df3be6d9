"""Triton kernels of the gated activation between two adapted projections.

Blocks are [T, K]; a low-rank term is formed where it is added.
"""

import triton
import triton.language as tl

from ssmtune.ops.projection.kernels import activation, low_rank_product


@triton.jit
def _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT: tl.constexpr, RANK: tl.constexpr):
    """Both halves of the inner projection with its low-rank term, fp32. B [2 K, r] is dense."""
    inside = (t < num_rows)[:, None] & (k < width)[None, :]
    at = t[:, None].to(tl.int64) * 2 * width + k[None, :]
    gate = tl.load(wide_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    gate += low_rank_product(v_ptr, B_ptr, t, k, num_rows, width, rank, rank, 1, EXACT, RANK)
    up += low_rank_product(v_ptr, B_ptr + width * rank, t, k, num_rows, width, rank, rank, 1, EXACT, RANK)
    return gate, up


@triton.jit(do_not_specialize=["num_rows"])
def gate_kernel(wide_ptr, v_ptr, B_ptr, y_ptr, num_rows, width, rank, EXACT: tl.constexpr, RANK: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write silu(gate) up [T, K], dense. Grid (blocks of K, blocks of T)."""
    t, k = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    gate, up = _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT, RANK)
    value, _ = activation(gate, True)
    inside = (t < num_rows)[:, None] & (k < width)[None, :]
    tl.store(y_ptr + t[:, None].to(tl.int64) * width + k[None, :], value * up, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def gate_back_kernel(wide_ptr, v_ptr, B_ptr, dy_ptr, dv_ptr, A_ptr, dwide_ptr, y_ptr, num_rows, width, rank, out_rank,
                     EXACT: tl.constexpr, RANK: tl.constexpr, OUT_RANK: tl.constexpr, BLOCK_T: tl.constexpr,
                     BLOCK_K: tl.constexpr):  # fmt: skip
    """Write the gradient of both halves [T, 2 K], and again silu(gate) up [T, K], dense. Grid as forward.

    The gradient of that value is dy [T, K] plus the outer projection's low-rank share, dv [T, r'] A [r', K].
    """
    t, k = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    gate, up = _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT, RANK)
    inside = (t < num_rows)[:, None] & (k < width)[None, :]
    at = t[:, None].to(tl.int64) * width + k[None, :]
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dy += low_rank_product(dv_ptr, A_ptr, t, k, num_rows, width, out_rank, 1, width, EXACT, OUT_RANK)
    value, slope = activation(gate, True)
    tl.store(y_ptr + at, value * up, mask=inside)
    at = t[:, None].to(tl.int64) * 2 * width + k[None, :]
    tl.store(dwide_ptr + at, dy * up * slope, mask=inside)
    tl.store(dwide_ptr + at + width, dy * value, mask=inside)
