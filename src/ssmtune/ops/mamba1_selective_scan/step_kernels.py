"""Triton kernel of one step of the Mamba-1 recurrence."""

import triton
import triton.language as tl

from ssmtune.ops.mamba2_chunk_scan.forward_kernels import log1p_exp


@triton.jit
def step_kernel(state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, skip_ptr, z_ptr, bias_ptr, y_ptr, D, N, state_b,
                state_d, state_n, x_b, x_d, dt_b, dt_d, A_d, A_n, B_b, B_n, C_b, C_n, skip_d, z_b, z_d, bias_d,
                SOFTPLUS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write y [B, D], and the new state in place. Grid (blocks of D, batch)."""
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    batch, channel = tl.program_id(1).to(tl.int64), d < D
    inside = channel[:, None] & (n < N)[None, :]
    dt = tl.load(dt_ptr + batch * dt_b + d * dt_d, mask=channel, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + d * bias_d, mask=channel, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = log1p_exp(dt)
    x = tl.load(x_ptr + batch * x_b + d * x_d, mask=channel, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * A_d + n[None, :] * A_n, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B_ptr + batch * B_b + n * B_n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C_ptr + batch * C_b + n * C_n, mask=n < N, other=0.0).to(tl.float32)
    cell = state_ptr + batch * state_b + d[:, None] * state_d + n[None, :] * state_n
    state = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    state = state * tl.exp(A * dt[:, None]) + (x * dt)[:, None] * b[None, :]
    tl.store(cell, state, mask=inside)
    y = tl.sum(state * c[None, :], axis=1)
    if HAS_SKIP:
        y += x * tl.load(skip_ptr + d * skip_d, mask=channel, other=0.0).to(tl.float32)
    if HAS_Z:
        z = tl.load(z_ptr + batch * z_b + d * z_d, mask=channel, other=0.0).to(tl.float32)
        y *= z / (1 + tl.exp(-z))
    tl.store(y_ptr + batch * D + d, y, mask=channel)
