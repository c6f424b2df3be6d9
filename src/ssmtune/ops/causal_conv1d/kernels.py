"""Triton kernels of the depthwise causal convolution by tiles, for any layout, without an initial window."""

import triton
import triton.language as tl


@triton.jit
def lagged(x_ptr, seq_ptr, mask_ptr, t, c, lag, num_steps, num_channels, x_c, x_t,
           HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """x at t - lag, [T, C] fp32: zero before the sequence, in another document, and at padding."""
    from_t = t - lag
    real = (from_t >= 0) & (t >= 0) & (t < num_steps)
    if HAS_SEQ:
        here = tl.load(seq_ptr + t, mask=real, other=0)
        real = real & (tl.load(seq_ptr + from_t, mask=real, other=-1) == here)
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + from_t, mask=real, other=0) != 0)
    inside = real[:, None] & (c < num_channels)[None, :]
    return tl.load(x_ptr + from_t[:, None].to(tl.int64) * x_t + c[None, :] * x_c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def before_activation(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, t, c, num_steps, num_channels, x_c, x_t,
                      weight_c, weight_k, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
                      HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """conv(x) + bias at t, [T, C] fp32."""
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for lag in tl.static_range(K):
        tap = tl.load(weight_ptr + c * weight_c + (K - 1 - lag) * weight_k, mask=c < num_channels, other=0.0)
        acc += tap.to(tl.float32)[None, :] * lagged(
            x_ptr, seq_ptr, mask_ptr, t, c, lag, num_steps, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK
        )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c, mask=c < num_channels, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_steps"])
def forward_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, y_ptr, num_steps, num_channels, x_b, x_c, x_t,
                   y_b, y_c, y_t, weight_c, weight_k, K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                   HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """Write act(conv(x) + bias). Grid (blocks of T, blocks of C, batch)."""
    batch = tl.program_id(2).to(tl.int64)
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    acc = before_activation(x_ptr + batch * x_b, weight_ptr, bias_ptr, seq_ptr, mask_ptr, t, c, num_steps,
                            num_channels, x_c, x_t, weight_c, weight_k, K, BLOCK_T, BLOCK_C, HAS_BIAS, HAS_SEQ,
                            HAS_MASK)  # fmt: skip
    if SILU:
        acc = acc / (1 + tl.exp(-acc))
    inside = (t < num_steps)[:, None] & (c < num_channels)[None, :]
    tl.store(y_ptr + batch * y_b + t[:, None].to(tl.int64) * y_t + c[None, :] * y_c, acc, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def gradient_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, mask_ptr, padded_ptr, dy_ptr, grad_ptr, num_steps,
                    num_channels, x_b, x_c, x_t, dy_b, dy_c, dy_t, grad_b, grad_c, grad_t, weight_c, weight_k,
                    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
                    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_T: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    """Write the gradient of the convolution before its activation, fp32, from that of its output. Grid as forward.

    Outputs that read an initial window get zero: `window_kernels` has them.
    """
    batch = tl.program_id(2).to(tl.int64)
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    inside = (t < num_steps)[:, None] & (c < num_channels)[None, :]
    grad = tl.load(dy_ptr + batch * dy_b + t[:, None].to(tl.int64) * dy_t + c[None, :] * dy_c, mask=inside,
                   other=0.0).to(tl.float32)  # fmt: skip
    if SILU:
        z = before_activation(x_ptr + batch * x_b, weight_ptr, bias_ptr, seq_ptr, mask_ptr, t, c, num_steps,
                              num_channels, x_c, x_t, weight_c, weight_k, K, BLOCK_T, BLOCK_C, HAS_BIAS, HAS_SEQ,
                              HAS_MASK)  # fmt: skip
        gate = 1 / (1 + tl.exp(-z))
        grad *= gate * (1 + z * (1 - gate))
    if HAS_WINDOW:
        from_first_real = t - tl.load(padded_ptr + batch)
        grad = tl.where(((from_first_real < 1 - K) | (from_first_real >= K - 1))[:, None], grad, 0.0)
    tl.store(grad_ptr + batch * grad_b + t[:, None].to(tl.int64) * grad_t + c[None, :] * grad_c, grad, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def backward_kernel(x_ptr, weight_ptr, seq_ptr, mask_ptr, grad_ptr, dx_ptr, dweight_ptr, dbias_ptr, num_steps,
                    num_channels, x_b, x_c, x_t, grad_b, grad_c, grad_t, dx_b, dx_c, dx_t, weight_c, weight_k,
                    K: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_MASK: tl.constexpr, TRAINS: tl.constexpr,
                    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write dx, and with TRAINS dweight [B, blocks of T, C, K] and dbias [B, blocks of T, C]. Grid as forward."""
    batch = tl.program_id(2).to(tl.int64)
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += batch * x_b
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    if HAS_MASK:
        mask_ptr += batch * num_steps
    channel = c < num_channels
    partial = (batch * tl.num_programs(0) + tl.program_id(0)) * num_channels + c
    acc = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for lag in tl.static_range(K):
        # An input reaches the output `lag` steps later.
        later = t + lag
        inside = (later < num_steps)[:, None] & channel[None, :]
        grad = tl.load(grad_ptr + batch * grad_b + later[:, None].to(tl.int64) * grad_t + c[None, :] * grad_c,
                       mask=inside, other=0.0)  # fmt: skip
        tap = tl.load(weight_ptr + c * weight_c + (K - 1 - lag) * weight_k, mask=channel, other=0.0).to(tl.float32)
        reaches = later < num_steps
        if HAS_SEQ:
            here = tl.load(seq_ptr + t, mask=reaches, other=0)
            reaches = reaches & (tl.load(seq_ptr + later, mask=reaches, other=-1) == here)
        acc += tl.where(reaches[:, None], grad * tap[None, :], 0.0)
        if TRAINS:
            if lag == 0:
                tl.store(dbias_ptr + partial, tl.sum(grad, axis=0), mask=channel)
            # The same products by output: this block's inputs with the outputs that they reach.
            own = lagged(x_ptr, seq_ptr, mask_ptr, t, c, 0, num_steps, num_channels, x_c, x_t, HAS_SEQ, HAS_MASK)
            share = tl.sum(tl.where(reaches[:, None], grad * own, 0.0), axis=0)
            tl.store(dweight_ptr + partial * K + (K - 1 - lag), share, mask=channel)
    if HAS_MASK:
        acc = tl.where((tl.load(mask_ptr + t, mask=t < num_steps, other=0) != 0)[:, None], acc, 0.0)
    inside = (t < num_steps)[:, None] & channel[None, :]
    tl.store(dx_ptr + batch * dx_b + t[:, None].to(tl.int64) * dx_t + c[None, :] * dx_c, acc, mask=inside)
