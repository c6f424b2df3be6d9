"""Triton kernels of what is around a projection's products: activation, dropout, and the sum with the low-rank term."""

import triton
import triton.language as tl

from ssmtune.ops.product_kernels import multiply


@triton.jit
def activation(x, SILU: tl.constexpr):
    """The activation and its derivative."""
    if SILU:
        sigmoid = 1 / (1 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    else:
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        slope = 2 * positive
    return value, slope


@triton.jit(do_not_specialize=["num_rows"])
def activate_kernel(x_ptr, up_ptr, y_ptr, num_rows, width, x_row, up_row, SILU: tl.constexpr, HAS_UP: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """Write act(x) up, dense. Grid (rows, blocks of the width)."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    y, _ = activation(x, SILU)
    if HAS_UP:
        y *= tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + at, y, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def activate_back_kernel(x_ptr, up_ptr, dy_ptr, dx_ptr, dup_ptr, y_ptr, num_rows, width, x_row, up_row, dx_row, dup_row,
                    SILU: tl.constexpr, HAS_UP: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write dx and dup, and with AGAIN the forward's result, dense like dy. Grid (rows, blocks of the width)."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = activation(x, SILU)
    if HAS_UP:
        up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dup_ptr + row * dup_row + at, dy * value, mask=inside)
        dy *= up
        value *= up
    tl.store(dx_ptr + row * dx_row + at, dy * slope, mask=inside)
    if AGAIN:
        tl.store(y_ptr + row * width + at, value, mask=inside)


@triton.jit
def dropout_kernel(x_ptr, y_ptr, seed_ptr, num, rate, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Write x with a share `rate` of its elements zero and the others scaled up, or with ADD add that to y.

    Which ones follows from the seed and the element's number alone. Grid (blocks of elements).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(tl.rand(tl.load(seed_ptr), at.to(tl.int32)) >= rate, x / (1 - rate), 0.0)
    if ADD:
        value += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, value, mask=inside)


@triton.jit
def low_rank_product(v_ptr, factor_ptr, t, o, num_rows, width, rank, factor_col, factor_rank, EXACT: tl.constexpr,
                     RANK: tl.constexpr):  # fmt: skip
    """v [T, r] factor [r, O], fp32; v is dense. A matrix product would be slow where the inner dimension is so short."""
    r = tl.arange(0, RANK)
    v = tl.load(v_ptr + t[:, None] * rank + r[None, :], mask=(t < num_rows)[:, None] & (r < rank)[None, :], other=0.0)
    at = r[:, None] * factor_rank + o[None, :] * factor_col
    factor = tl.load(factor_ptr + at, mask=(r < rank)[:, None] & (o < width)[None, :], other=0.0)
    return multiply(v, factor, EXACT)


@triton.jit(do_not_specialize=["num_rows"])
def add_low_rank_kernel(y_ptr, v_ptr, factor_ptr, residual_ptr, num_rows, width, rank, factor_col, factor_rank, alpha,
                        ADDS: tl.constexpr, EXACT: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr,
                        BLOCK_O: tl.constexpr):  # fmt: skip
    """Add alpha v [T, r] factor [r, O] to y [T, O], in place, and with ADDS the residual [T, O]; all are dense.

    Grid (blocks of O, blocks of T).
    """
    t, o = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    product = low_rank_product(v_ptr, factor_ptr, t, o, num_rows, width, rank, factor_col, factor_rank, EXACT, RANK)
    where = t[:, None].to(tl.int64) * width + o[None, :]
    inside = (t < num_rows)[:, None] & (o < width)[None, :]
    y = tl.load(y_ptr + where, mask=inside, other=0.0).to(tl.float32) + alpha * product
    if ADDS:
        y += tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + where, y, mask=inside)
