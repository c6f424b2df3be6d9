"""Triton kernel of the causal convolution's way back over channels that lie side by side; terms as in `rolling_kernels`."""

import triton
import triton.language as tl

from ssmtune.ops.causal_conv1d.rolling_kernels import (
    are_of_one,
    convolve,
    load_row,
    load_steps,
    load_taps,
    load_window,
    shift,
    sigmoid,
    within,
)


@triton.jit
def _load_upstream(row_ptr, padded, first, end, c, num_channels, dy_c, dy_t, K: tl.constexpr, HAS_WINDOW: tl.constexpr,
                   AHEAD: tl.constexpr):  # fmt: skip
    """dy of AHEAD steps as stored, zero at the outputs that read an initial window, and the place of the row behind them."""
    grads = ()
    for i in tl.static_range(AHEAD):
        t = first + i
        real = t < end
        if HAS_WINDOW:
            real = real & ((t < padded - (K - 1)) | (t >= padded + K - 1))
        grads = grads + (load_row(row_ptr, real, c, num_channels, dy_c),)
        row_ptr += dy_t
    return grads, row_ptr


@triton.jit
def _convolve_back(g, documents, taps, K: tl.constexpr, CROSSES: tl.constexpr):
    """The gradient [C] of the oldest input in the window, all of whose outputs are in it."""
    acc = taps[0] * g[K - 1]
    for lag in tl.static_range(1, K):
        acc += taps[lag] * within(g[K - 1 - lag], documents[K - 1 - lag], documents[K - 1], CROSSES)
    return acc


@triton.jit
def _add_products(products, own, g, documents, K: tl.constexpr, CROSSES: tl.constexpr):
    """The gradients of the taps by their lag, with the share of the oldest input, which is `own`."""
    added = (products[0] + own * g[K - 1],)
    for lag in tl.static_range(1, K):
        value = within(g[K - 1 - lag], documents[K - 1 - lag], documents[K - 1], CROSSES)
        added = added + (products[lag] + own * value,)
    return added


@triton.jit
def _steps(rows, grads, numbers, x, g, documents, products, total, taps, bias, dx_row_ptr, mask_ptr, first, start,
           num_steps, c, num_channels, dx_c, dx_t, K: tl.constexpr, SILU: tl.constexpr, HAS_MASK: tl.constexpr,
           TRAINS: tl.constexpr, CROSSES: tl.constexpr, AHEAD: tl.constexpr):  # fmt: skip
    """Write the gradients of the inputs K - 1 steps before `rows`; return what stands behind the last of these."""
    for i in tl.static_range(AHEAD):
        x, documents = shift(rows[i].to(tl.float32), x, K), shift(numbers[i], documents, K)
        grad = grads[i].to(tl.float32)
        if SILU:
            z = convolve(x, documents, taps, bias, K, CROSSES)
            gate = sigmoid(z)
            grad *= gate * (1 + z * (1 - gate))
        g = shift(grad, g, K)
        t = first + i - (K - 1)
        own = (t >= start) & (t < num_steps)
        acc = _convolve_back(g, documents, taps, K, CROSSES)
        if TRAINS:
            total += g[K - 1]
            products = _add_products(products, tl.where(own, x[K - 1], 0.0), g, documents, K, CROSSES)
        if HAS_MASK:
            acc = tl.where(tl.load(mask_ptr + t, mask=own, other=0) != 0, acc, 0.0)
        tl.store(dx_row_ptr + c * dx_c, acc, mask=c < tl.where(own, num_channels, 0))
        dx_row_ptr += dx_t
    return x, g, documents, products, total, dx_row_ptr


@triton.jit(do_not_specialize=["num_steps"])
def rolling_conv_back_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, padded_ptr, dy_ptr, dx_ptr, dweight_ptr,
                             dbias_ptr, num_steps, num_channels, x_b, x_c, x_t, dy_b, dy_c, dy_t, dx_b, dx_c, dx_t,
                             weight_c, weight_k, K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                             HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr,
                             TRAINS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr,
                             BLOCK_C: tl.constexpr):  # fmt: skip
    """Write dx, and with TRAINS dweight [B, segments, C, K] and dbias [B, segments, C].

    A program walks over STEPS outputs s. At each, the input at s - (K - 1) has met all that it reaches; its segment are
    those of these inputs that are not before its first output, STEPS - (K - 1). Grid as forward, of these segments.
    Outputs that read an initial window get zero gradient: `window_kernels` has them.
    """
    tl.static_assert(STEPS % AHEAD == 0)
    num_blocks, batch = tl.cdiv(num_channels, BLOCK_C), tl.program_id(1).to(tl.int64)
    c, segment = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(0) // num_blocks
    start = segment * (STEPS - (K - 1))
    end = tl.minimum(start + STEPS, num_steps)
    padded = 0
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    if HAS_WINDOW:
        padded = tl.load(padded_ptr + batch)
    x_ptr += batch * x_b
    x_row_ptr, dy_row_ptr = x_ptr + start.to(tl.int64) * x_t, dy_ptr + batch * dy_b + start.to(tl.int64) * dy_t
    dx_row_ptr = dx_ptr + batch * dx_b + (start - (K - 1)).to(tl.int64) * dx_t
    rows, numbers, x_row_ptr = load_steps(
        x_row_ptr, seq_ptr, mask_ptr, start, end, c, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK, AHEAD
    )
    grads, dy_row_ptr = _load_upstream(
        dy_row_ptr, padded, start, end, c, num_channels, dy_c, dy_t, K, HAS_WINDOW, AHEAD
    )
    x, documents = load_window(x_ptr, mask_ptr, seq_ptr, start, c, num_channels, x_c, x_t, K, HAS_SEQ, HAS_MASK)
    zeros = tl.zeros([BLOCK_C], tl.float32)
    taps, bias, total, g, products = load_taps(weight_ptr, c, num_channels, weight_c, weight_k, K), zeros, zeros, (), ()
    for _ in tl.static_range(K):
        g, products = g + (zeros,), products + (zeros,)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < num_channels, other=0.0).to(tl.float32)
    for done in tl.range(0, tl.minimum(STEPS, num_steps + K - 1 - start), AHEAD):
        first = start + done
        next_rows, next_numbers, x_row_ptr = load_steps(
            x_row_ptr, seq_ptr, mask_ptr, first + AHEAD, end, c, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK, AHEAD
        )
        next_grads, dy_row_ptr = _load_upstream(
            dy_row_ptr, padded, first + AHEAD, end, c, num_channels, dy_c, dy_t, K, HAS_WINDOW, AHEAD
        )
        crosses = HAS_SEQ
        if HAS_SEQ:
            crosses = not are_of_one(documents, numbers, K, AHEAD)
        if crosses:
            x, g, documents, products, total, dx_row_ptr = _steps(
                rows, grads, numbers, x, g, documents, products, total, taps, bias, dx_row_ptr, mask_ptr, first, start,
                num_steps, c, num_channels, dx_c, dx_t, K, SILU, HAS_MASK, TRAINS, True, AHEAD,
            )  # fmt: skip
        else:
            x, g, documents, products, total, dx_row_ptr = _steps(
                rows, grads, numbers, x, g, documents, products, total, taps, bias, dx_row_ptr, mask_ptr, first, start,
                num_steps, c, num_channels, dx_c, dx_t, K, SILU, HAS_MASK, TRAINS, False, AHEAD,
            )  # fmt: skip
        rows, grads, numbers = next_rows, next_grads, next_numbers
    if TRAINS:
        num_segments = tl.num_programs(0) // num_blocks
        partial = (batch * num_segments + segment) * num_channels + c
        tl.store(dbias_ptr + partial, total, mask=c < num_channels)
        for lag in tl.static_range(K):
            tl.store(dweight_ptr + partial * K + (K - 1 - lag), products[lag], mask=c < num_channels)
