"""Triton kernel of one step of the depthwise causal convolution."""

import triton
import triton.language as tl


@triton.jit
def step_kernel(x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, num_channels, x_b, x_c, state_b, state_c, state_k,
                weight_c, weight_k, K: tl.constexpr, LENGTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """Write act(conv(x) + bias) [B, C] and shift x into the state of LENGTH inputs. Grid (blocks of C, batch)."""
    c, batch = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1).to(tl.int64)
    channel = c < num_channels
    state_ptr += batch * state_b
    # The inputs by their lag; those that move up are all read before the first is overwritten.
    inputs = (tl.load(x_ptr + batch * x_b + c * x_c, mask=channel, other=0.0).to(tl.float32),)
    for lag in tl.static_range(1, LENGTH + 1):
        held = tl.load(state_ptr + c * state_c + (LENGTH - lag) * state_k, mask=channel, other=0.0).to(tl.float32)
        inputs = inputs + (held,)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for lag in tl.static_range(K):
        tap = tl.load(weight_ptr + c * weight_c + (K - 1 - lag) * weight_k, mask=channel, other=0.0).to(tl.float32)
        acc += tap * inputs[lag]
    for lag in tl.static_range(LENGTH):
        tl.store(state_ptr + c * state_c + (LENGTH - 1 - lag) * state_k, inputs[lag], mask=channel)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c, mask=channel, other=0.0).to(tl.float32)
    if SILU:
        acc = acc / (1 + tl.exp(-acc))
    tl.store(y_ptr + batch * num_channels + c, acc, mask=channel)
