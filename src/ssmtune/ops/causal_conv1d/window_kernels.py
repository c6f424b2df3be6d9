"""Triton kernels for what an initial window of the convolution changes: the few outputs that read it, and their gradients.

The window holds the K - 1 inputs before the first real step, which `padded` [B] steps of padding precede.
"""

import triton
import triton.language as tl

from ssmtune.ops.causal_conv1d.kernels import before_activation, lagged


@triton.jit
def _from_window(window_ptr, seq_ptr, t, c, lag, num_steps, num_channels, num_padded, window_c, window_k,
                 K: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """What the window holds for t - lag, [T, C] fp32; it belongs to the first document."""
    slot = t - lag - num_padded + K - 1
    real = (slot >= 0) & (slot < K - 1) & (t >= 0) & (t < num_steps)
    if HAS_SEQ:
        here = tl.load(seq_ptr + t, mask=real, other=0)
        real = real & (tl.load(seq_ptr + tl.maximum(t - lag, 0), mask=real, other=-1) == here)
    inside = real[:, None] & (c < num_channels)[None, :]
    at = slot[:, None] * window_k + c[None, :] * window_c
    return tl.load(window_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _with_window(x_ptr, weight_ptr, bias_ptr, window_ptr, seq_ptr, mask_ptr, t, c, num_steps, num_channels, num_padded,
                 x_c, x_t, weight_c, weight_k, window_c, window_k, K: tl.constexpr, BLOCK_T: tl.constexpr,
                 BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
                 HAS_MASK: tl.constexpr):  # fmt: skip
    """conv(window and x) + bias at t, [T, C] fp32."""
    acc = before_activation(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, t, c, num_steps, num_channels, x_c, x_t,
                            weight_c, weight_k, K, BLOCK_T, BLOCK_C, HAS_BIAS, HAS_SEQ, HAS_MASK)  # fmt: skip
    for lag in tl.static_range(K):
        tap = tl.load(weight_ptr + c * weight_c + (K - 1 - lag) * weight_k, mask=c < num_channels, other=0.0)
        acc += tap.to(tl.float32)[None, :] * _from_window(
            window_ptr, seq_ptr, t, c, lag, num_steps, num_channels, num_padded, window_c, window_k, K, HAS_SEQ
        )
    return acc


@triton.jit
def _gradient_at(step, grad, t, c, weight_ptr, seq_ptr, num_steps, num_channels, weight_c, weight_k, K: tl.constexpr,
                 HAS_SEQ: tl.constexpr):  # fmt: skip
    """The gradient [C] of the input at a step, which may lie before the first, from those of the outputs at t."""
    lag = t - step
    reaches = (lag >= 0) & (lag < K) & (t >= 0) & (t < num_steps)
    if HAS_SEQ:
        here = tl.load(seq_ptr + tl.minimum(tl.maximum(step, 0), num_steps - 1))
        reaches = reaches & (tl.load(seq_ptr + t, mask=reaches, other=-1) == here)
    inside = reaches[:, None] & (c < num_channels)[None, :]
    at = c[None, :] * weight_c + (K - 1 - lag)[:, None] * weight_k
    return tl.sum(grad * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["num_steps"])
def window_kernel(x_ptr, weight_ptr, bias_ptr, window_ptr, seq_ptr, mask_ptr, padded_ptr, y_ptr, num_steps,
                  num_channels, x_b, x_c, x_t, y_b, y_c, y_t, weight_c, weight_k, window_b, window_c, window_k,
                  K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
                  HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write act(conv + bias) over the outputs that read the window. Grid (blocks of C, batch)."""
    c, batch = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1).to(tl.int64)
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    num_padded = tl.load(padded_ptr + batch)
    t = num_padded - (K - 1) + tl.arange(0, BLOCK_T)
    acc = _with_window(x_ptr + batch * x_b, weight_ptr, bias_ptr, window_ptr + batch * window_b, seq_ptr, mask_ptr, t,
                       c, num_steps, num_channels, num_padded, x_c, x_t, weight_c, weight_k, window_c, window_k, K,
                       BLOCK_T, BLOCK_C, HAS_BIAS, HAS_SEQ, HAS_MASK)  # fmt: skip
    if SILU:
        acc = acc / (1 + tl.exp(-acc))
    inside = ((t >= 0) & (t < num_steps))[:, None] & (c < num_channels)[None, :]
    tl.store(y_ptr + batch * y_b + t[:, None].to(tl.int64) * y_t + c[None, :] * y_c, acc, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def window_back_kernel(x_ptr, weight_ptr, bias_ptr, window_ptr, seq_ptr, mask_ptr, padded_ptr, dy_ptr, dx_ptr,
                       dwindow_ptr, dweight_ptr, dbias_ptr, num_steps, num_channels, x_b, x_c, x_t, dy_b, dy_c, dy_t,
                       dx_b, dx_c, dx_t, weight_c, weight_k, window_b, window_c, window_k, K: tl.constexpr,
                       SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr,
                       BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write dwindow [B, C, K - 1], dx of the first K - 1 real inputs, and these outputs' dweight [B, C, K] and dbias [B, C].

    Grid (blocks of C, batch).
    """
    c, batch = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1).to(tl.int64)
    x_ptr, window_ptr = x_ptr + batch * x_b, window_ptr + batch * window_b
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    num_padded, channel = tl.load(padded_ptr + batch), c < num_channels
    first = num_padded - (K - 1)
    t = first + tl.arange(0, BLOCK_T)
    inside = ((t >= 0) & (t < num_steps))[:, None] & channel[None, :]
    grad = tl.load(dy_ptr + batch * dy_b + t[:, None].to(tl.int64) * dy_t + c[None, :] * dy_c, mask=inside,
                   other=0.0).to(tl.float32)  # fmt: skip
    if SILU:
        z = _with_window(x_ptr, weight_ptr, bias_ptr, window_ptr, seq_ptr, mask_ptr, t, c, num_steps, num_channels,
                         num_padded, x_c, x_t, weight_c, weight_k, window_c, window_k, K, BLOCK_T, BLOCK_C, HAS_BIAS,
                         HAS_SEQ, HAS_MASK)  # fmt: skip
        gate = 1 / (1 + tl.exp(-z))
        grad *= gate * (1 + z * (1 - gate))
    line = batch * num_channels + c
    for slot in tl.static_range(K - 1):
        own = _gradient_at(first + slot, grad, t, c, weight_ptr, seq_ptr, num_steps, num_channels, weight_c, weight_k,
                           K, HAS_SEQ)  # fmt: skip
        tl.store(dwindow_ptr + line * (K - 1) + slot, own, mask=channel)
        step = num_padded + slot
        own = _gradient_at(step, grad, t, c, weight_ptr, seq_ptr, num_steps, num_channels, weight_c, weight_k, K,
                           HAS_SEQ)  # fmt: skip
        if HAS_MASK:
            own = tl.where(tl.load(mask_ptr + step, mask=step < num_steps, other=0) != 0, own, 0.0)
        there = c < tl.where(step < num_steps, num_channels, 0)
        tl.store(dx_ptr + batch * dx_b + step.to(tl.int64) * dx_t + c * dx_c, own, mask=there)
    grad = tl.where((t < num_padded + K - 1)[:, None], grad, 0.0)
    tl.store(dbias_ptr + line, tl.sum(grad, axis=0), mask=channel)
    for lag in tl.static_range(K):
        value = lagged(x_ptr, seq_ptr, mask_ptr, t, c, lag, num_steps, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK)
        value += _from_window(window_ptr, seq_ptr, t, c, lag, num_steps, num_channels, num_padded, window_c, window_k,
                              K, HAS_SEQ)  # fmt: skip
        tl.store(dweight_ptr + line * K + (K - 1 - lag), tl.sum(grad * value, axis=0), mask=channel)
