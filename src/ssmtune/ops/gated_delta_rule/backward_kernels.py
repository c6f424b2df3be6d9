"""Triton kernels of the gated delta rule's backward pass; layout and names as in `forward_kernels`.

`grads` [K, V] of a cell is the gradient of the state that leaves it; `written_grad` [L, V] of what it writes to its state,
first by what its own steps read of it, and in whole once the walk back has passed.
"""

import triton
import triton.language as tl

from ssmtune.ops.gated_delta_rule.forward_kernels import gate, left_of_state, pair_decay, scaled_rows
from ssmtune.ops.mamba2_chunk_scan.forward_kernels import load_block
from ssmtune.ops.product_kernels import multiply


@triton.jit(do_not_specialize=["num_steps"])
def delta_reads_kernel(q_ptr, k_ptr, g_ptr, seq_ptr, dy_ptr, start_ptr, written_grad_ptr, q_start_ptr, num_steps, num_heads,
                     per_key, K, V, scale, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
                     HAS_SEQ: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, L: tl.constexpr,
                     BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write the gradient that the chunk's own steps give to what is written, and q_start [L, K]. Grid (chunks, lines)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d = tl.arange(0, L), tl.arange(0, BLOCK_K)
    t, cell = chunk * L + i, line * tl.num_programs(0) + chunk
    g = gate(g_ptr + batch * g_b + head * g_h, t, num_steps, g_t)
    q, _ = scaled_rows(q_ptr + batch * q_b + head // per_key * q_h, t, d, num_steps, K, q_t, scale, NORM, EPS)
    k, _ = scaled_rows(k_ptr + batch * k_b + head // per_key * k_h, t, d, num_steps, K, k_t, 1.0, NORM, EPS)
    q_start = q * tl.load(start_ptr + cell * L + i)[:, None]
    tl.store(q_start_ptr + cell * L * K + i[:, None] * K + d[None, :], q_start, mask=d[None, :] < K)
    reads = multiply(q, tl.trans(k), EXACT) * pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    for first in range(0, V, BLOCK_V):
        e = first + tl.arange(0, BLOCK_V)
        dy = load_block(dy_ptr + batch * dy_b + head * dy_h, t, e, num_steps, V, dy_t, 1)
        grad = multiply(tl.trans(reads), dy, EXACT)
        tl.store(written_grad_ptr + cell * L * V + i[:, None] * V + e[None, :], grad, mask=e[None, :] < V)


@triton.jit(do_not_specialize=["num_steps", "num_chunks"])
def delta_leaving_kernel(w_ptr, k_end_ptr, q_start_ptr, start_ptr, dy_ptr, final_grad_ptr, written_grad_ptr, grads_ptr,
                   initial_grad_ptr, num_steps, num_chunks, num_heads, K, V, dy_b, dy_t, dy_h, HAS_FINAL: tl.constexpr,
                   L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EXACT: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Walk from the last chunk to the first with the state's gradient in registers; write it where it leaves each chunk.

    Grid (blocks of V, lines).
    """
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d, e = tl.arange(0, L), tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = d[:, None] * V + e[None, :]
    inside = (d[:, None] < K) & (e[None, :] < V)
    dy_ptr += batch * dy_b + head * dy_h
    grad = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_FINAL:
        grad = tl.load(final_grad_ptr + line * K * V + at, mask=inside, other=0.0).to(tl.float32)
    for back in tl.range(num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - back
        cell = line * num_chunks + chunk
        keep = left_of_state(start_ptr + cell * L, L)
        w = load_block(w_ptr + cell * L * K, i, d, L, K, K, 1)
        k_end = load_block(k_end_ptr + cell * L * K, i, d, L, K, K, 1)
        q_start = load_block(q_start_ptr + cell * L * K, i, d, L, K, K, 1)
        dy = load_block(dy_ptr, chunk * L + i, e, num_steps, V, dy_t, 1)
        values = written_grad_ptr + cell * L * V + i[:, None] * V + e[None, :]
        own = tl.load(values, mask=e[None, :] < V, other=0.0).to(tl.float32)
        tl.store(grads_ptr + cell * K * V + at, grad, mask=inside)
        written = own + multiply(k_end, grad, EXACT)
        tl.store(values, written, mask=e[None, :] < V)
        grad = grad * keep + multiply(tl.trans(q_start), dy, EXACT) - multiply(tl.trans(w), written, EXACT)
    tl.store(initial_grad_ptr + line * K * V + at, grad, mask=inside)


@triton.jit
def through_pairs(by_pair, L: tl.constexpr):
    """Gradient of g [L] by the decays of pairs: each step sums what lies between a step before it and itself or a later one."""
    i = tl.arange(0, L)
    later = tl.cumsum(by_pair, axis=0, reverse=True)
    return tl.sum(tl.where(i[None, :] < i[:, None], later, 0.0), axis=1)


@triton.jit
def through_norm(grad, x, factor, NORM: tl.constexpr, scale):
    """Gradient of a row of q or k by that of the row as the recurrence reads it, x, which is factor times the row."""
    if NORM:
        grad -= x * (tl.sum(grad * x, axis=1) / (scale * scale))[:, None]
    return grad * factor[:, None]


@triton.jit(do_not_specialize=["num_steps"])
def delta_reads_back_kernel(q_ptr, k_ptr, g_ptr, seq_ptr, dy_ptr, start_ptr, end_ptr, written_ptr, states_ptr, grads_ptr, dq_ptr,
                      k_grad_ptr, g_grad_ptr, num_steps, num_heads, per_key, K, V, scale, q_b, q_t, q_h, k_b, k_t, k_h,
                      g_b, g_t, g_h, dy_b, dy_t, dy_h, HAS_SEQ: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
                      L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write dq [B, T, H, K], and of k as it is read and of g what comes by reads and by the states. Grid (chunks, lines)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d = tl.arange(0, L), tl.arange(0, BLOCK_K)
    t, cell = chunk * L + i, line * tl.num_programs(0) + chunk
    q_grad = tl.zeros([L, BLOCK_K], tl.float32)
    k_grad = tl.zeros([L, BLOCK_K], tl.float32)
    reads_grad = tl.zeros([L, L], tl.float32)
    kept = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, V, BLOCK_V):
        e = first + tl.arange(0, BLOCK_V)
        dy = load_block(dy_ptr + batch * dy_b + head * dy_h, t, e, num_steps, V, dy_t, 1)
        written = load_block(written_ptr + cell * L * V, i, e, L, V, V, 1)
        entering = load_block(states_ptr + cell * K * V, d, e, K, V, V, 1)
        leaving = load_block(grads_ptr + cell * K * V, d, e, K, V, V, 1)
        q_grad += multiply(dy, tl.trans(entering), EXACT)
        k_grad += multiply(written, tl.trans(leaving), EXACT)
        reads_grad += multiply(dy, tl.trans(written), EXACT)
        kept += tl.sum(entering.to(tl.float32) * leaving.to(tl.float32), axis=1)
    q, q_factor = scaled_rows(q_ptr + batch * q_b + head // per_key * q_h, t, d, num_steps, K, q_t, scale, NORM, EPS)
    k, _ = scaled_rows(k_ptr + batch * k_b + head // per_key * k_h, t, d, num_steps, K, k_t, 1.0, NORM, EPS)
    g = gate(g_ptr + batch * g_b + head * g_h, t, num_steps, g_t)
    start, end = tl.load(start_ptr + cell * L + i), tl.load(end_ptr + cell * L + i)
    q_grad *= start[:, None]
    k_grad *= end[:, None]
    by_start, by_end = tl.sum(q_grad * q, axis=1), tl.sum(k_grad * k, axis=1)
    scores_grad = reads_grad * pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    g_grad = through_pairs(scores_grad * multiply(q, tl.trans(k), EXACT), L)
    g_grad += tl.cumsum(by_start, axis=0, reverse=True)
    g_grad += tl.sum(kept) * left_of_state(start_ptr + cell * L, L)
    g_grad += tl.sum(tl.where(i[None, :] < i[:, None], by_end[None, :], 0.0), axis=1)
    tl.store(g_grad_ptr + cell * L + i, g_grad)
    k_grad += multiply(tl.trans(scores_grad), q, EXACT)
    tl.store(k_grad_ptr + cell * L * K + i[:, None] * K + d[None, :], k_grad, mask=d[None, :] < K)
    q_grad = through_norm(q_grad + multiply(scores_grad, k, EXACT), q, q_factor, NORM, scale)
    where = ((batch * num_steps + t[:, None]) * num_heads + head) * K + d[None, :]
    tl.store(dq_ptr + where, q_grad, mask=(t[:, None] < num_steps) & (d[None, :] < K))


@triton.jit(do_not_specialize=["num_steps"])
def delta_couplings_back_kernel(k_ptr, v_ptr, g_ptr, beta_ptr, seq_ptr, start_ptr, solve_ptr, written_grad_ptr, states_ptr,
                          k_grad_ptr, g_grad_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, num_steps, num_heads, per_key, K, V,
                          k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, beta_b, beta_t, beta_h, HAS_SEQ: tl.constexpr,
                          NORM: tl.constexpr, EPS: tl.constexpr, L: tl.constexpr, BLOCK_K: tl.constexpr,
                          BLOCK_V: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write dk [B, T, H, K], dv [B, T, H, V], dg and dbeta [B, T, H] (fp32). Grid (chunks, lines)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = line // num_heads, line % num_heads
    i, d = tl.arange(0, L), tl.arange(0, BLOCK_K)
    t, cell = chunk * L + i, line * tl.num_programs(0) + chunk
    beta = gate(beta_ptr + batch * beta_b + head * beta_h, t, num_steps, beta_t)
    solve = tl.load(solve_ptr + cell * L * L + i[:, None] * L + i[None, :])
    w_grad = tl.zeros([L, BLOCK_K], tl.float32)
    solve_grad = tl.zeros([L, L], tl.float32)
    beta_grad = tl.zeros([L], tl.float32)
    for first in range(0, V, BLOCK_V):
        e = first + tl.arange(0, BLOCK_V)
        v = load_block(v_ptr + batch * v_b + head * v_h, t, e, num_steps, V, v_t, 1).to(tl.float32)
        u_grad = load_block(written_grad_ptr + cell * L * V, i, e, L, V, V, 1)
        entering = load_block(states_ptr + cell * K * V, d, e, K, V, V, 1)
        w_grad -= multiply(u_grad, tl.trans(entering), EXACT)
        solve_grad += multiply(u_grad, tl.trans(v * beta[:, None]), EXACT)
        solved = multiply(tl.trans(solve), u_grad, EXACT)
        beta_grad += tl.sum(solved * v, axis=1)
        where = ((batch * num_steps + t[:, None]) * num_heads + head) * V + e[None, :]
        tl.store(dv_ptr + where, solved * beta[:, None], mask=(t[:, None] < num_steps) & (e[None, :] < V))
    g = gate(g_ptr + batch * g_b + head * g_h, t, num_steps, g_t)
    start = tl.load(start_ptr + cell * L + i)
    k, k_factor = scaled_rows(k_ptr + batch * k_b + head // per_key * k_h, t, d, num_steps, K, k_t, 1.0, NORM, EPS)
    solve_grad += multiply(w_grad, tl.trans(k * (beta * start)[:, None]), EXACT)
    solved = multiply(tl.trans(solve), w_grad, EXACT) * start[:, None]
    by_start = tl.sum(solved * k, axis=1)
    # With S the inverse of I + L: dL = -S^T dS S^T below the diagonal.
    between = multiply(tl.trans(solve), solve_grad, EXACT)
    strict_grad = tl.where(i[:, None] > i[None, :], -multiply(between, tl.trans(solve), EXACT), 0.0)
    strict_grad *= pair_decay(g, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    by_pair = strict_grad * multiply(k, tl.trans(k), EXACT)
    beta_grad += by_start + tl.sum(by_pair, axis=1)
    g_grad = tl.load(g_grad_ptr + cell * L + i) + through_pairs(by_pair * beta[:, None], L)
    g_grad += tl.cumsum(by_start * beta, axis=0, reverse=True)
    keys = cell * L * K + i[:, None] * K + d[None, :]
    k_grad = tl.load(k_grad_ptr + keys, mask=d[None, :] < K, other=0.0) + solved * beta[:, None]
    strict_grad *= beta[:, None]
    k_grad += multiply(strict_grad, k, EXACT) + multiply(tl.trans(strict_grad), k, EXACT)
    gates = (batch * num_steps + t) * num_heads + head
    tl.store(dg_ptr + gates, g_grad, mask=t < num_steps)
    tl.store(dbeta_ptr + gates, beta_grad, mask=t < num_steps)
    where = ((batch * num_steps + t[:, None]) * num_heads + head) * K + d[None, :]
    k_grad = through_norm(k_grad, k, k_factor, NORM, 1.0)
    tl.store(dk_ptr + where, k_grad, mask=(t[:, None] < num_steps) & (d[None, :] < K))
