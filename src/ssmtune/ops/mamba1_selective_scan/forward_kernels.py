"""Triton kernels of the Mamba-1 scan that its forward and its backward pass share.

A sequence is cut into chunks of L steps.  One program walks over one chunk of BLOCK_D channels, step by step, with the
state [N, D] in registers: channels lie along threads, so that sums over N need no exchange between threads.
`states` [B, c, N, D] and `sums` [B, c, D], the steps dt added over a chunk, are fp32, as all arithmetic is.
`flags` [B, T]: bit 0 is set where a step counts (it is not padding), bit 1 where a document begins.
Rows of x, dt, z, y [B, T, D] and of B, C [B, T, N] are contiguous.
"""

import triton
import triton.language as tl

from ssmtune.ops.mamba2_chunk_scan.forward_kernels import log1p_exp


@triton.jit
def load_row(ptr, t, at, stride_t, inside):
    """Row t of a matrix in fp32, zero where not inside."""
    return tl.load(ptr + t.to(tl.int64) * stride_t + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, n, d, N, D, stride_n, stride_d):
    """[N, D] in fp32, zero outside."""
    inside = (n[:, None] < N) & (d[None, :] < D)
    return tl.load(ptr + n[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_channels(ptr, d, D, GIVEN: tl.constexpr):
    """[D] in fp32, zero where there is none."""
    values = tl.zeros(d.shape, tl.float32)
    if GIVEN:
        values = tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return values


@triton.jit
def step_size(dt_ptr, bias, flags_ptr, t, d, num_steps, D, dt_t, SOFTPLUS: tl.constexpr,
              HAS_FLAGS: tl.constexpr):  # fmt: skip
    """dt + bias before softplus [D], where it counts, and the step: softplus of it, zero where it does not count."""
    num_real = tl.where(t < num_steps, D, 0)
    raw = load_row(dt_ptr, t, d, dt_t, d < num_real) + bias
    if HAS_FLAGS:
        num_real = tl.where((tl.load(flags_ptr + t, mask=t < num_steps, other=0) & 1) != 0, num_real, 0)
    step = raw
    if SOFTPLUS:
        step = log1p_exp(raw)
    return raw, d < num_real, tl.where(d < num_real, step, 0.0)


@triton.jit
def kept(flags_ptr, t, num_steps):
    """What remains of the state that enters step t: 0 where a document begins, else 1."""
    return 1.0 - ((tl.load(flags_ptr + t, mask=t < num_steps, other=0) >> 1) & 1).to(tl.float32)


@triton.jit
def kept_over_chunk(flags_ptr, first, num_steps, L: tl.constexpr):
    """What remains of the state that enters a chunk, but for its decay: 0 where a document begins in it, else 1."""
    t = first + tl.arange(0, L)
    return 1.0 - tl.max((tl.load(flags_ptr + t, mask=t < num_steps, other=0) >> 1) & 1).to(tl.float32)


@triton.jit
def advance(state, A, bias, x_ptr, dt_ptr, B_ptr, flags_ptr, t, d, n, num_steps, D, N, x_t, dt_t, B_t,
            SOFTPLUS: tl.constexpr, HAS_FLAGS: tl.constexpr):  # fmt: skip
    """The state after step t, its x and its dt [D]; steps beyond T change nothing."""
    _, _, step = step_size(dt_ptr, bias, flags_ptr, t, d, num_steps, D, dt_t, SOFTPLUS, HAS_FLAGS)
    x = load_row(x_ptr, t, d, x_t, d < tl.where(t < num_steps, D, 0))
    b = load_row(B_ptr, t, n, B_t, n < tl.where(t < num_steps, N, 0))
    if HAS_FLAGS:
        state *= kept(flags_ptr, t, num_steps)
    state = state * tl.exp(A * step[None, :]) + b[:, None] * (step * x)[None, :]
    return state, x, step


@triton.jit(do_not_specialize=["num_steps", "x_b", "dt_b", "B_b"])
def chunk_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, flags_ptr, states_ptr, sums_ptr, num_steps, D, N, x_b, x_t,
                 dt_b, dt_t, B_b, B_t, A_d, A_n, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_FLAGS: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write the state that each chunk builds up from zero, and its `sums`. Grid (blocks of D, chunks, batch)."""
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    first, batch = tl.program_id(1) * L, tl.program_id(2).to(tl.int64)
    A, bias = load_tile(A_ptr, n, d, N, D, A_n, A_d), load_channels(bias_ptr, d, D, HAS_BIAS)
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    state, total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.minimum(L, num_steps - first)):
        state, _, step = advance(state, A, bias, x_ptr + batch * x_b, dt_ptr + batch * dt_b, B_ptr + batch * B_b,
                                 flags_ptr, first + i, d, n, num_steps, D, N, x_t, dt_t, B_t, SOFTPLUS,
                                 HAS_FLAGS)  # fmt: skip
        total += step
    line = batch * tl.num_programs(1) + tl.program_id(1)
    inside = (n[:, None] < N) & (d[None, :] < D)
    tl.store(states_ptr + (line * N + n[:, None]) * D + d[None, :], state, mask=inside)
    tl.store(sums_ptr + line * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["num_steps", "num_chunks", "initial_b"])
def pass_kernel(states_ptr, sums_ptr, A_ptr, initial_ptr, final_ptr, flags_ptr, num_steps, num_chunks, D, N, A_d, A_n,
                initial_b, initial_d, initial_n, HAS_INITIAL: tl.constexpr, HAS_FLAGS: tl.constexpr, L: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Turn what each chunk builds up into the state that enters it, in place; write the final one [B, N, D].

    Grid (blocks of D, batch).
    """
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    A = load_tile(A_ptr, n, d, N, D, A_n, A_d)
    inside = (n[:, None] < N) & (d[None, :] < D)
    cell = n[:, None] * D + d[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_INITIAL:
        state = load_tile(initial_ptr + batch * initial_b, n, d, N, D, initial_n, initial_d)
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    for chunk in tl.range(num_chunks, num_stages=STAGES):
        line = batch * num_chunks + chunk
        added = tl.load(states_ptr + line * N * D + cell, mask=inside, other=0.0)
        total = tl.load(sums_ptr + line * D + d, mask=d < D, other=0.0)
        tl.store(states_ptr + line * N * D + cell, state, mask=inside)
        if HAS_FLAGS:
            state *= kept_over_chunk(flags_ptr, chunk * L, num_steps, L)
        state = state * tl.exp(A * total[None, :]) + added
    tl.store(final_ptr + batch * N * D + cell, state, mask=inside)


@triton.jit(do_not_specialize=["num_steps", "x_b", "dt_b", "B_b", "C_b", "z_b"])
def output_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, skip_ptr, z_ptr, flags_ptr, states_ptr, y_ptr,
                  num_steps, D, N, x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, A_d, A_n,
                  SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr,
                  HAS_FLAGS: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write y [B, T, D] from the states that enter the chunks. Grid (blocks of D, chunks, batch)."""
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    first, batch = tl.program_id(1) * L, tl.program_id(2).to(tl.int64)
    A, bias = load_tile(A_ptr, n, d, N, D, A_n, A_d), load_channels(bias_ptr, d, D, HAS_BIAS)
    skip = load_channels(skip_ptr, d, D, HAS_SKIP)
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    state = load_tile(states_ptr + (batch * tl.num_programs(1) + tl.program_id(1)) * N * D, n, d, N, D, D, 1)
    for i in range(tl.minimum(L, num_steps - first)):
        t = first + i
        state, x, _ = advance(state, A, bias, x_ptr + batch * x_b, dt_ptr + batch * dt_b, B_ptr + batch * B_b,
                              flags_ptr, t, d, n, num_steps, D, N, x_t, dt_t, B_t, SOFTPLUS, HAS_FLAGS)  # fmt: skip
        y = tl.sum(state * load_row(C_ptr + batch * C_b, t, n, C_t, n < N)[:, None], axis=0) + skip * x
        if HAS_Z:
            z = load_row(z_ptr + batch * z_b, t, d, z_t, d < D)
            y *= z / (1 + tl.exp(-z))
        tl.store(y_ptr + (batch * num_steps + t) * D + d, y, mask=d < D)
