"""Triton kernel of one step of the Mamba-2 recurrence."""

import triton
import triton.language as tl

from ssmtune.ops.mamba2_chunk_scan.forward_kernels import log1p_exp


@triton.jit
def step_kernel(state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, num_heads, per_group, P, N, low,
                high, state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, A_h, B_b, B_g, B_n, C_b, C_g, C_n,
                D_h, bias_h, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write y [B, H, P], and the new state in place. Grid (blocks of P, heads, batch)."""
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // per_group
    dt = tl.load(dt_ptr + batch * dt_b + head * dt_h).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + head * bias_h).to(tl.float32)
    if SOFTPLUS:
        dt = log1p_exp(dt)
    if LIMITED:
        dt = tl.minimum(tl.maximum(dt, low), high)
    x = tl.load(x_ptr + batch * x_b + head * x_h + p * x_p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(B_ptr + batch * B_b + group * B_g + n * B_n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + batch * C_b + group * C_g + n * C_n, mask=n < N, other=0.0).to(tl.float32)
    inside = (p < P)[:, None] & (n < N)[None, :]
    cell = state_ptr + batch * state_b + head * state_h + p[:, None] * state_p + n[None, :] * state_n
    state = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    state = state * tl.exp(tl.load(A_ptr + head * A_h).to(tl.float32) * dt) + (x * dt)[:, None] * b[None, :]
    tl.store(cell, state, mask=inside)
    y = tl.sum(state * c[None, :], axis=1)
    if HAS_D:
        y += x * tl.load(D_ptr + head * D_h).to(tl.float32)
    tl.store(y_ptr + (batch * num_heads + head) * P + p, y, mask=p < P)
