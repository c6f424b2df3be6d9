"""Triton kernels of the gated activation between two adapted projections.

Blocks are [T, K]; a low-rank term is a product of [T, r] and [r, K] that is formed where it is added.
"""

import triton
import triton.language as tl


@triton.jit
def _low_rank(v_ptr, factor_ptr, t, k, num_rows, width, rank, factor_col, factor_rank, EXACT: tl.constexpr,
              RANK: tl.constexpr):  # fmt: skip
    """v [T, r] factor [r, K], fp32; v is dense."""
    r = tl.arange(0, RANK)
    v = tl.load(v_ptr + t[:, None] * rank + r[None, :], mask=(t < num_rows)[:, None] & (r < rank)[None, :], other=0.0)
    at = r[:, None] * factor_rank + k[None, :] * factor_col
    factor = tl.load(factor_ptr + at, mask=(r < rank)[:, None] & (k < width)[None, :], other=0.0)
    if EXACT:
        return tl.dot(v.to(tl.float32), factor.to(tl.float32), input_precision="tf32x3")
    return tl.dot(v, factor)


@triton.jit
def _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT: tl.constexpr, RANK: tl.constexpr):
    """Both halves of the inner projection with its low-rank term, fp32. B [2 K, r] is dense."""
    inside = (t < num_rows)[:, None] & (k < width)[None, :]
    at = t[:, None].to(tl.int64) * 2 * width + k[None, :]
    gate = tl.load(wide_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide_ptr + at + width, mask=inside, other=0.0).to(tl.float32)
    gate += _low_rank(v_ptr, B_ptr, t, k, num_rows, width, rank, rank, 1, EXACT, RANK)
    up += _low_rank(v_ptr, B_ptr + width * rank, t, k, num_rows, width, rank, rank, 1, EXACT, RANK)
    return gate, up


@triton.jit(do_not_specialize=["num_rows"])
def gate_kernel(wide_ptr, v_ptr, B_ptr, y_ptr, num_rows, width, rank, EXACT: tl.constexpr, RANK: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write silu(gate) up [T, K], dense. Grid (blocks of K, blocks of T)."""
    t, k = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    gate, up = _halves(wide_ptr, v_ptr, B_ptr, t, k, num_rows, width, rank, EXACT, RANK)
    value = gate / (1 + tl.exp(-gate)) * up
    inside = (t < num_rows)[:, None] & (k < width)[None, :]
    tl.store(y_ptr + t[:, None].to(tl.int64) * width + k[None, :], value, mask=inside)


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
    dy += _low_rank(dv_ptr, A_ptr, t, k, num_rows, width, out_rank, 1, width, EXACT, OUT_RANK)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    tl.store(y_ptr + at, silu * up, mask=inside)
    at = t[:, None].to(tl.int64) * 2 * width + k[None, :]
    tl.store(dwide_ptr + at, dy * up * (sigmoid + silu * (1 - sigmoid)), mask=inside)
    tl.store(dwide_ptr + at + width, dy * silu, mask=inside)
