"""Triton kernels of the Mamba-2 scan that its forward and its backward pass share.

A sequence is cut into chunks of L steps; one program works on one chunk of one head (or group).
`step` [B, H, T'] is dt after bias, softplus, limits and padding; `decay` [B, H, T'] the running sum of A dt inside the
chunk; T' is T rounded up to whole chunks, and steps beyond T are zero.
`states` [B, H, c, P, N] are kept in fp32, beside bf16 activations in bf16; everything summed is fp32.
"""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, EXACT: tl.constexpr):
    """a @ b, summed in fp32: of operands rounded to bf16, or of fp32 ones split in three, which keeps their precision."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))


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
def edge_weights(step_ptr, decay_ptr, seq_ptr, batch, chunk, num_steps, AT_END: tl.constexpr,
                 HAS_SEQ: tl.constexpr, L: tl.constexpr):  # fmt: skip
    """[L]: what a step adds to the state at the chunk's end (times its dt), or reads of the state at its start."""
    i = tl.arange(0, L)
    decay = tl.load(decay_ptr + i)
    if AT_END:
        weight = tl.exp(tl.load(decay_ptr + L - 1) - decay) * tl.load(step_ptr + i)
    else:
        weight = tl.exp(decay)
    if HAS_SEQ:
        own, last, before = documents(seq_ptr, batch, chunk, num_steps, L)
        if AT_END:
            weight = tl.where(own == last, weight, 0.0)
        else:
            weight = tl.where(own == before, weight, 0.0)
    return weight


@triton.jit(do_not_specialize=["num_steps"])
def states_kernel(rows_ptr, cols_ptr, step_ptr, decay_ptr, seq_ptr, out_ptr, num_steps, num_heads, per_group, P, N,
                  rows_b, rows_t, rows_h, cols_b, cols_t, cols_g, AT_END: tl.constexpr, HAS_SEQ: tl.constexpr,
                  L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write sum_l weight_l rows_l cols_l^T, [P, N] per chunk and head. Grid (chunks, batch * heads, blocks of N).

    With x and B at the end: the state that a chunk adds. With dy and C at the start: the gradient of what enters.
    """
    chunk, batch, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    num_chunks = tl.num_programs(0)
    t = chunk * L + tl.arange(0, L)
    p, n = tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.program_id(1).to(tl.int64) * num_chunks * L + chunk * L
    weight = edge_weights(step_ptr + line, decay_ptr + line, seq_ptr, batch, chunk,
                          num_steps, AT_END, HAS_SEQ, L)  # fmt: skip
    rows = load_block(rows_ptr + batch.to(tl.int64) * rows_b + head * rows_h, t, p, num_steps, P, rows_t, 1)
    cols = load_block(cols_ptr + batch.to(tl.int64) * cols_b + head // per_group * cols_g, t, n, num_steps, N,
                      cols_t, 1)  # fmt: skip
    acc = multiply(tl.trans(rows.to(tl.float32) * weight[:, None]), cols, EXACT)
    cell = (tl.program_id(1).to(tl.int64) * num_chunks + chunk) * P * N
    inside = (p[:, None] < P) & (n[None, :] < N)
    tl.store(out_ptr + cell + p[:, None] * N + n[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["num_steps", "num_chunks"])
def pass_kernel(states_ptr, initial_ptr, final_ptr, decay_ptr, seq_ptr, num_steps, num_chunks, num_heads, size,
                HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Turn what each chunk adds into the state that enters it, in place. Grid (blocks of P * N, batch * heads)."""
    line, batch = tl.program_id(1).to(tl.int64), tl.program_id(1) // num_heads
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + line * size + at, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(num_chunks, num_stages=STAGES):
        cell = states_ptr + (line * num_chunks + chunk) * size + at
        added = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
        tl.store(cell, state, mask=inside)
        keep = tl.exp(tl.load(decay_ptr + (line * num_chunks + chunk) * L + L - 1))
        if HAS_SEQ:
            last = tl.load(seq_ptr + batch.to(tl.int64) * num_steps + tl.minimum(chunk * L + L - 1, num_steps - 1))
            before = tl.load(seq_ptr + batch.to(tl.int64) * num_steps + tl.maximum(chunk * L - 1, 0))
            keep = tl.where(last == before, keep, 0.0)
        state = state * keep + added
    tl.store(final_ptr + line * size + at, state, mask=inside)


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
    acc *= edge_weights(step_ptr + line, decay_ptr + line, seq_ptr, batch, chunk, num_steps, False, HAS_SEQ, L)[:, None]
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
