"""Triton kernels of the gated activation between two adapted projections.

Blocks are [T, K]; a low-rank term is formed where it is added.
"""

import triton
import triton.language as tl

from ssmtune.ops.product_kernels import multiply
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


@triton.jit(do_not_specialize=["num_rows", "tiles_each"])
def gate_kernel(wide_ptr, v_ptr, B_ptr, y_ptr, num_rows, tiles_each, width, rank, EXACT: tl.constexpr,
                RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write silu(gate) up [T, K], dense. Grid (blocks of K, shares of the rows)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    for tile in tl.range(tiles_each, num_stages=STAGES):
        t = (tl.program_id(1) * tiles_each + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        gate, up = _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT, RANK)
        value, _ = activation(gate, True)
        inside = (t < num_rows)[:, None] & (k < width)[None, :]
        tl.store(y_ptr + t[:, None].to(tl.int64) * width + k[None, :], value * up, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "tiles_each"])
def gate_back_kernel(wide_ptr, v_ptr, B_ptr, dy_ptr, dv_ptr, A_ptr, dwide_ptr, y_ptr, v_grad_ptr, dA_ptr, dB_ptr,
                     num_rows, tiles_each, width, rank, out_rank, SUMS: tl.constexpr, EXACT: tl.constexpr,
                     RANK: tl.constexpr, OUT_RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
                     STAGES: tl.constexpr):  # fmt: skip
    """Write the gradient of both halves [T, 2 K], dense. Grid (blocks of K, shares of the rows).

    The gradient of the forward's value silu(gate) up is dy [T, K] plus the outer projection's low-rank share,
    dv [T, r'] A [r', K]. Without SUMS that value is written again, [T, K]; with it, what the low-rank factors get, while
    the tile is in registers, since a product by itself would read it from memory again: `v_grad` [blocks of K, T, r], the
    inner low-rank input's gradient by block, and by share `dA` [shares, r', K] and `dB` [shares, 2 K, r].
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r, out_r = tl.arange(0, RANK), tl.arange(0, OUT_RANK)
    factor_at, factor_in = k[:, None] * rank + r[None, :], (k < width)[:, None] & (r < rank)[None, :]
    dA = tl.zeros([OUT_RANK, BLOCK_K], tl.float32)
    gate_dB = tl.zeros([BLOCK_K, RANK], tl.float32)
    up_dB = tl.zeros([BLOCK_K, RANK], tl.float32)
    for tile in tl.range(tiles_each, num_stages=STAGES):
        t = (tl.program_id(1) * tiles_each + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = t < num_rows
        inside = rows[:, None] & (k < width)[None, :]
        gate, up = _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT, RANK)
        at = t[:, None].to(tl.int64) * width + k[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dy += low_rank_product(dv_ptr, A_ptr, t, k, num_rows, width, out_rank, 1, width, EXACT, OUT_RANK)
        value, slope = activation(gate, True)
        if not SUMS:
            tl.store(y_ptr + at, value * up, mask=inside)
        at = t[:, None].to(tl.int64) * 2 * width + k[None, :]
        dgate, dup = (dy * up * slope).to(dwide_ptr.dtype.element_ty), (dy * value).to(dwide_ptr.dtype.element_ty)
        tl.store(dwide_ptr + at, dgate, mask=inside)
        tl.store(dwide_ptr + at + width, dup, mask=inside)
        if SUMS:
            v_at, v_in = t[:, None] * rank + r[None, :], rows[:, None] & (r < rank)[None, :]
            v = tl.load(v_ptr + v_at, mask=v_in, other=0.0)
            dv = tl.load(dv_ptr + t[:, None] * out_rank + out_r[None, :],
                         mask=rows[:, None] & (out_r < out_rank)[None, :], other=0.0)  # fmt: skip
            dA += multiply(tl.trans(dv), value * up, EXACT)
            gate_dB += multiply(tl.trans(dgate), v, EXACT)
            up_dB += multiply(tl.trans(dup), v, EXACT)
            v_grad = multiply(dgate, tl.load(B_ptr + factor_at, mask=factor_in, other=0.0), EXACT)
            v_grad += multiply(dup, tl.load(B_ptr + width * rank + factor_at, mask=factor_in, other=0.0), EXACT)
            tl.store(v_grad_ptr + tl.program_id(0).to(tl.int64) * num_rows * rank + v_at, v_grad, mask=v_in)
    if SUMS:
        share = tl.program_id(1).to(tl.int64)
        tl.store(dA_ptr + (share * out_rank + out_r[:, None]) * width + k[None, :], dA,
                 mask=(out_r < out_rank)[:, None] & (k < width)[None, :])  # fmt: skip
        dB_ptr += share * 2 * width * rank
        tl.store(dB_ptr + factor_at, gate_dB, mask=factor_in)
        tl.store(dB_ptr + width * rank + factor_at, up_dB, mask=factor_in)
