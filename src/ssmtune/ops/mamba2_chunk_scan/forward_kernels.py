"""Triton kernels of the Mamba-2 scan that its forward and its backward pass share.

A sequence is cut into chunks of L steps; one program works on one chunk of one head (or group), or walks over all of a
head's with a part of its state.
`step` [B, H, T'] is dt after bias, softplus, limits and padding; `decay` [B, H, T'] the running sum of A dt inside the
chunk; T' is T rounded up to whole chunks, and steps beyond T are zero.
`states` [B, H, c, P, N] are kept in fp32, beside bf16 activations in bf16; everything summed is fp32.
"""

import triton
import triton.language as tl

from ssmtune.ops.product_kernels import multiply


@triton.jit
def load_block(ptr, row, col, num_rows, num_cols, stride_row, stride_col):
    """[rows, cols] of a matrix, zero outside of it."""
    inside = (row[:, None] < num_rows) & (col[None, :] < num_cols)
    return tl.load(ptr + row[:, None] * stride_row + col[None, :] * stride_col, mask=inside, other=0.0)


@triton.jit
def documents(seq_ptr, batch, chunk, num_steps, L: tl.constexpr):
    """Document of each step [L], of the chunk's last step, and of the step before the chunk; steps beyond T go on."""
    seq_ptr += batch.to(tl.int64) * num_steps
    t = chunk * L + tl.arange(0, L)
    own = tl.load(seq_ptr + tl.minimum(t, num_steps - 1))
    last = tl.load(seq_ptr + tl.minimum(chunk * L + L - 1, num_steps - 1))
    before = tl.load(seq_ptr + tl.maximum(chunk * L - 1, 0))
    return own, last, before


@triton.jit
def log1p_exp(v):
    """softplus, precise also where exp(v) is far below 1."""
    e = tl.exp(tl.minimum(v, 20.0))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6))))))
    return tl.where(v > 20.0, v, tl.where(e < 0.0625, series, tl.log(1 + e)))


@triton.jit
def raw_steps(dt_ptr, bias_ptr, mask_ptr, batch, t, h, num_steps, num_heads, dt_t, dt_h, HAS_BIAS: tl.constexpr,
              HAS_MASK: tl.constexpr):  # fmt: skip
    """dt + bias [L, heads] before softplus, and where it counts: inside the sequence and not padding."""
    v = load_block(dt_ptr, t, h, num_steps, num_heads, dt_t, dt_h).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=h < num_heads, other=0.0).to(tl.float32)[None, :]
    counts = (t < num_steps)[:, None] & (h < num_heads)[None, :]
    if HAS_MASK:
        mask_ptr += batch * num_steps
        counts = counts & (tl.load(mask_ptr + t, mask=t < num_steps, other=0) != 0)[:, None]
    return v, counts


@triton.jit(do_not_specialize=["num_steps"])
def steps_kernel(dt_ptr, bias_ptr, A_ptr, mask_ptr, step_ptr, decay_ptr, num_steps, num_heads, low, high,
                 dt_b, dt_t, dt_h, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_MASK: tl.constexpr, L: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Write `step` and `decay`. Grid (chunks, blocks of heads, batch)."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * L + tl.arange(0, L)
    v, counts = raw_steps(dt_ptr + batch * dt_b, bias_ptr, mask_ptr, batch, t, h, num_steps, num_heads,
                          dt_t, dt_h, HAS_BIAS, HAS_MASK)  # fmt: skip
    if SOFTPLUS:
        v = log1p_exp(v)
    if LIMITED:
        v = tl.minimum(tl.maximum(v, low), high)
    step = tl.where(counts, v, 0.0)
    A = tl.load(A_ptr + h, mask=h < num_heads, other=0.0).to(tl.float32)
    length = tl.num_programs(0) * L
    where = (batch * num_heads + h)[None, :] * length + t[:, None]
    inside = (h < num_heads)[None, :] & (t >= 0)[:, None]
    tl.store(step_ptr + where, step, mask=inside)
    tl.store(decay_ptr + where, tl.cumsum(step * A[None, :], axis=0), mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def scores_kernel(C_ptr, B_ptr, out_ptr, num_steps, num_groups, N, C_b, C_t, C_g, B_b, B_t, B_g,
                  L: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write C_l . B_s for all pairs of steps of a chunk, [B, c, G, L, L]. Grid (chunks, batch * groups)."""
    chunk, batch, group = tl.program_id(0), tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    i = tl.arange(0, L)
    t = chunk * L + i
    C_ptr += batch.to(tl.int64) * C_b + group * C_g
    B_ptr += batch.to(tl.int64) * B_b + group * B_g
    acc = tl.zeros([L, L], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        c = load_block(C_ptr, t, n, num_steps, N, C_t, 1)
        b = load_block(B_ptr, t, n, num_steps, N, B_t, 1)
        acc += multiply(c, tl.trans(b), EXACT)
    cell = ((batch * tl.num_programs(0) + chunk) * num_groups + group).to(tl.int64) * L * L
    tl.store(out_ptr + cell + i[:, None] * L + i[None, :], acc)


@triton.jit
def edge_weights(step_ptr, decay_ptr, L: tl.constexpr):
    """[L]: what each step reads of the state at the chunk's start, and adds to that at its end; and how much of it is left.

    The last is picked out of a block: a load of one number would hold up a walk over chunks.
    """
    i = tl.arange(0, L)
    decay = tl.load(decay_ptr + i)
    whole = tl.sum(tl.where(i == L - 1, decay, 0.0))
    return tl.exp(decay), tl.exp(whole - decay) * tl.load(step_ptr + i), tl.exp(whole)


@triton.jit(do_not_specialize=["num_steps", "num_chunks"])
def entering_kernel(x_ptr, B_ptr, step_ptr, decay_ptr, seq_ptr, initial_ptr, out_ptr, final_ptr, num_steps, num_chunks,
                    num_heads, per_group, P, N, x_b, x_t, x_h, B_b, B_t, B_g, HAS_INITIAL: tl.constexpr,
                    HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                    EXACT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write the state that enters each chunk, and the final one: walk over the chunks with the state in registers.

    Grid (blocks of P, blocks of N, batch * heads).
    """
    batch, head = (tl.program_id(2) // num_heads).to(tl.int64), tl.program_id(2) % num_heads
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, L)
    line = tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_b + head * x_h
    B_ptr += batch * B_b + head // per_group * B_g
    step_ptr += line * num_chunks * L
    decay_ptr += line * num_chunks * L
    at = p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + line * P * N + at, mask=inside, other=0.0).to(tl.float32)
    before = 0
    if HAS_SEQ:
        seq_ptr += batch * num_steps
        before = tl.load(seq_ptr)
    for chunk in tl.range(num_chunks, num_stages=STAGES):
        t = chunk * L + i
        _, weight, keep = edge_weights(step_ptr + chunk * L, decay_ptr + chunk * L, L)
        if HAS_SEQ:
            own = tl.load(seq_ptr + tl.minimum(t, num_steps - 1))
            last = tl.sum(tl.where(i == L - 1, own, 0))
            weight = tl.where(own == last, weight, 0.0)
            keep = tl.where(last == before, keep, 0.0)
            before = last
        x = load_block(x_ptr, t, p, num_steps, P, x_t, 1)
        b = load_block(B_ptr, t, n, num_steps, N, B_t, 1)
        tl.store(out_ptr + (line * num_chunks + chunk) * P * N + at, state, mask=inside)
        state = state * keep + multiply(tl.trans(x.to(tl.float32) * weight[:, None]), b, EXACT)
    tl.store(final_ptr + line * P * N + at, state, mask=inside)


@triton.jit
def pair_weights(decay_ptr, seq_ptr, batch, chunk, num_steps, HAS_SEQ: tl.constexpr, L: tl.constexpr):
    """[L, L]: how much of step s (column) is left at step l (row) of the same chunk and document; 0 for s > l."""
    i = tl.arange(0, L)
    decay = tl.load(decay_ptr + i)
    allowed = i[:, None] >= i[None, :]
    if HAS_SEQ:
        own, _, _ = documents(seq_ptr, batch, chunk, num_steps, L)
        allowed = allowed & (own[:, None] == own[None, :])
    return tl.exp(tl.where(allowed, decay[:, None] - decay[None, :], float("-inf")))


@triton.jit(do_not_specialize=["num_steps"])
def output_kernel(x_ptr, C_ptr, D_ptr, scores_ptr, states_ptr, step_ptr, decay_ptr, seq_ptr, y_ptr, num_steps,
                  num_heads, per_group, P, N, x_b, x_t, x_h, C_b, C_t, C_g, HAS_D: tl.constexpr,
                  HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                  EXACT: tl.constexpr):  # fmt: skip
    """Write y: what the entering state and the chunk's own steps give, plus D x. Grid (chunks, batch * heads)."""
    chunk, batch, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    num_chunks, group = tl.num_programs(0), head // per_group
    i, p = tl.arange(0, L), tl.arange(0, BLOCK_P)
    t = chunk * L + i
    line = tl.program_id(1).to(tl.int64) * num_chunks * L + chunk * L
    C_ptr += batch.to(tl.int64) * C_b + group * C_g
    states_ptr += (tl.program_id(1).to(tl.int64) * num_chunks + chunk) * P * N
    acc = tl.zeros([L, BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        c = load_block(C_ptr, t, n, num_steps, N, C_t, 1)
        entering = load_block(states_ptr, p, n, P, N, N, 1)
        acc += multiply(c, tl.trans(entering), EXACT)
    from_start, _, _ = edge_weights(step_ptr + line, decay_ptr + line, L)
    if HAS_SEQ:
        own, _, before = documents(seq_ptr, batch, chunk, num_steps, L)
        from_start = tl.where(own == before, from_start, 0.0)
    acc *= from_start[:, None]
    num_groups = num_heads // per_group
    scores_ptr += ((batch * num_chunks + chunk) * num_groups + group).to(tl.int64) * L * L
    weight = pair_weights(decay_ptr + line, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    weight *= tl.load(scores_ptr + i[:, None] * L + i[None, :]) * tl.load(step_ptr + line + i)[None, :]
    x = load_block(x_ptr + batch.to(tl.int64) * x_b + head * x_h, t, p, num_steps, P, x_t, 1)
    acc += multiply(weight, x, EXACT)
    if HAS_D:
        acc += tl.load(D_ptr + head).to(tl.float32) * x.to(tl.float32)
    where = ((batch.to(tl.int64) * num_steps + t[:, None]) * num_heads + head) * P + p[None, :]
    tl.store(y_ptr + where, acc, mask=(t[:, None] < num_steps) & (p[None, :] < P))
