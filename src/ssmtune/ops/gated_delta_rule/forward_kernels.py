"""Triton kernels of the gated delta rule that its forward and its backward pass share.

A sequence is cut into chunks of L steps. One program works on one chunk of one value head, or walks over all of a head's
with some columns of its state in registers. Formulas and their names are those of the reference.
A line is a value head of a sequence, a cell a chunk of a line. Kept per cell, in fp32, beside bf16 activations in bf16:
`solve` [L, L], the inverse of I + L; `w` and `k_end` [L, K]; `written` [L, V], which holds u until the walk has passed;
`states` [K, V], what enters the chunk. `start` and `end` are decays [lines, T'] in fp32, 0 across documents;
T' is T rounded up to whole chunks, and steps beyond T have g = beta = 0. Everything summed is fp32.
"""

import triton
import triton.language as tl

from ssmtune.ops.mamba2_chunk_scan.forward_kernels import documents, load_block
from ssmtune.ops.product_kernels import multiply


@triton.jit
def scaled_rows(ptr, t, d, num_steps, width, stride_t, scale, NORM: tl.constexpr, EPS: tl.constexpr):
    """Rows of q or k [L, width] as the recurrence reads them, and what each was multiplied by [L]."""
    x = load_block(ptr, t, d, num_steps, width, stride_t, 1).to(tl.float32)
    factor = tl.zeros_like(tl.sum(x, axis=1)) + scale
    if NORM:
        factor = factor * tl.rsqrt(tl.sum(x * x, axis=1) + EPS)
    return x * factor[:, None], factor


@triton.jit
def gate(ptr, t, num_steps, stride_t):
    """A gate of each step [L], 0 beyond the last."""
    return tl.load(ptr + t.to(tl.int64) * stride_t, mask=t < num_steps, other=0.0).to(tl.float32)


@triton.jit
def pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ: tl.constexpr, L: tl.constexpr):
    """[L, L]: what of step s (column) is left at step l (row) of one document, 0 for s > l.

    Each sum is taken by itself: a difference of running sums would lose a mild decay after a strong one.
    """
    i = tl.arange(0, L)
    total = tl.cumsum(tl.where(i[:, None] > i[None, :], g[:, None], 0.0), axis=0)
    allowed = i[:, None] >= i[None, :]
    if HAS_SEQ:
        own, _, _ = documents(seq_ptr, batch, chunk, num_steps, L)
        allowed = allowed & (own[:, None] == own[None, :])
    return tl.exp(tl.where(allowed, total, float("-inf")))


@triton.jit
def unit_lower_inverse(strict, L: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """(I + strict)^-1 of a strictly lower triangular [L, L] of four blocks.

    Rows of the blocks on the diagonal are substituted one after the other, all blocks at once. With D their inverse and
    N = D times what is below them, N^4 = 0 and the inverse is (I + N)^-1 D = (I - N) (I + N^2) D.
    """
    # bf16 would round more than what the result is rounded to afterwards.
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    i = tl.arange(0, L)
    same = (i[:, None] // BLOCK) == (i[None, :] // BLOCK)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    inside = tl.where(same, strict, 0.0)
    inverse = eye
    for row in range(1, BLOCK):
        here = (i % BLOCK == row)[:, None]
        factors = tl.sum(tl.where(here, inside, 0.0), axis=0)
        change = tl.sum(factors[:, None] * inverse, axis=0)
        inverse = tl.where(here & same, eye - change[None, :], inverse)
    below = tl.dot(inverse, tl.where(same, 0.0, strict), input_precision=PRECISION)
    squared = tl.dot(below, below, input_precision=PRECISION)
    series = tl.dot(eye - below, eye + squared, input_precision=PRECISION)
    return tl.dot(series, inverse, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_steps"])
def delta_couplings_kernel(k_ptr, v_ptr, g_ptr, beta_ptr, seq_ptr, solve_ptr, w_ptr, written_ptr, k_end_ptr, start_ptr, end_ptr,
                     num_steps, num_heads, per_key, K, V, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t,
                     beta_h, HAS_SEQ: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, L: tl.constexpr,
                     SUB: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write what a chunk does to any state that enters it. Grid (chunks, lines)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d = tl.arange(0, L), tl.arange(0, BLOCK_K)
    t, cell = chunk * L + i, line * tl.num_programs(0) + chunk
    g = gate(g_ptr + batch * g_b + head * g_h, t, num_steps, g_t)
    beta = gate(beta_ptr + batch * beta_b + head * beta_h, t, num_steps, beta_t)
    k, _ = scaled_rows(k_ptr + batch * k_b + head // per_key * k_h, t, d, num_steps, K, k_t, 1.0, NORM, EPS)
    start = tl.exp(tl.cumsum(g, axis=0))
    end = tl.exp(tl.sum(tl.where(i[:, None] > i[None, :], g[:, None], 0.0), axis=0))
    if HAS_SEQ:
        own, last, before = documents(seq_ptr, batch, chunk, num_steps, L)
        start = tl.where(own == before, start, 0.0)
        end = tl.where(own == last, end, 0.0)
    tl.store(start_ptr + cell * L + i, start)
    tl.store(end_ptr + cell * L + i, end)
    decay = pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    strict = tl.where(i[:, None] > i[None, :], multiply(k, tl.trans(k), EXACT) * decay * beta[:, None], 0.0)
    solve = unit_lower_inverse(strict, L, SUB, EXACT)
    tl.store(solve_ptr + cell * L * L + i[:, None] * L + i[None, :], solve)
    keys = cell * L * K + i[:, None] * K + d[None, :]
    tl.store(w_ptr + keys, multiply(solve, k * (beta * start)[:, None], EXACT), mask=d[None, :] < K)
    tl.store(k_end_ptr + keys, k * end[:, None], mask=d[None, :] < K)
    for first in range(0, V, BLOCK_V):
        e = first + tl.arange(0, BLOCK_V)
        v = load_block(v_ptr + batch * v_b + head * v_h, t, e, num_steps, V, v_t, 1).to(tl.float32)
        u = multiply(solve, v * beta[:, None], EXACT)
        tl.store(written_ptr + cell * L * V + i[:, None] * V + e[None, :], u, mask=e[None, :] < V)


@triton.jit
def left_of_state(start_ptr, L: tl.constexpr):
    """How much of the state that enters a chunk leaves it. Picked out of a block: a load of one number holds up a walk."""
    i = tl.arange(0, L)
    return tl.sum(tl.where(i == L - 1, tl.load(start_ptr + i), 0.0))


@triton.jit(do_not_specialize=["num_chunks"])
def delta_entering_kernel(w_ptr, k_end_ptr, start_ptr, initial_ptr, written_ptr, states_ptr, final_ptr, num_chunks, K, V,
                    HAS_INITIAL: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
                    EXACT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write the state that enters each chunk and the final one, and turn u into what is written to the state.

    Grid (blocks of V, lines).
    """
    line = tl.program_id(1).to(tl.int64)
    i, d, e = tl.arange(0, L), tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = d[:, None] * V + e[None, :]
    inside = (d[:, None] < K) & (e[None, :] < V)
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + line * K * V + at, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(num_chunks, num_stages=STAGES):
        cell = line * num_chunks + chunk
        keep = left_of_state(start_ptr + cell * L, L)
        w = load_block(w_ptr + cell * L * K, i, d, L, K, K, 1)
        k_end = load_block(k_end_ptr + cell * L * K, i, d, L, K, K, 1)
        values = written_ptr + cell * L * V + i[:, None] * V + e[None, :]
        u = tl.load(values, mask=e[None, :] < V, other=0.0).to(tl.float32)
        tl.store(states_ptr + cell * K * V + at, state, mask=inside)
        written = u - multiply(w, state, EXACT)
        tl.store(values, written, mask=e[None, :] < V)
        state = state * keep + multiply(tl.trans(k_end), written, EXACT)
    tl.store(final_ptr + line * K * V + at, state, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def delta_output_kernel(q_ptr, k_ptr, g_ptr, seq_ptr, start_ptr, written_ptr, states_ptr, y_ptr, num_steps, num_heads, per_key,
                  K, V, scale, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, HAS_SEQ: tl.constexpr, NORM: tl.constexpr,
                  EPS: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
                  EXACT: tl.constexpr):  # fmt: skip
    """Write y [B, T, H, V]: what the entering state and the chunk's own steps give. Grid (chunks, lines)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d = tl.arange(0, L), tl.arange(0, BLOCK_K)
    t, cell = chunk * L + i, line * tl.num_programs(0) + chunk
    g = gate(g_ptr + batch * g_b + head * g_h, t, num_steps, g_t)
    q, _ = scaled_rows(q_ptr + batch * q_b + head // per_key * q_h, t, d, num_steps, K, q_t, scale, NORM, EPS)
    k, _ = scaled_rows(k_ptr + batch * k_b + head // per_key * k_h, t, d, num_steps, K, k_t, 1.0, NORM, EPS)
    reads = multiply(q, tl.trans(k), EXACT) * pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    q_start = q * tl.load(start_ptr + cell * L + i)[:, None]
    for first in range(0, V, BLOCK_V):
        e = first + tl.arange(0, BLOCK_V)
        entering = load_block(states_ptr + cell * K * V, d, e, K, V, V, 1)
        written = load_block(written_ptr + cell * L * V, i, e, L, V, V, 1)
        y = multiply(q_start, entering, EXACT) + multiply(reads, written, EXACT)
        where = ((batch * num_steps + t[:, None]) * num_heads + head) * V + e[None, :]
        tl.store(y_ptr + where, y, mask=(t[:, None] < num_steps) & (e[None, :] < V))
