"""Triton kernels of the Mamba-2 scan's backward pass; shapes and names as in `forward_kernels`.

Write a_l for the running log decay of a chunk, E for the state that enters it, G for the gradient of the state that
leaves it.  The gradient of one step's log decay is collected from all pairs (earlier input, later output) that it lies
between, and never as a difference of two sums that include pairs outside: those would cancel only in exact arithmetic.
"""

import triton
import triton.language as tl

from ssmtune.ops.mamba2_chunk_scan.forward_kernels import (
    documents,
    edge_weights,
    load_block,
    log1p_exp,
    pair_weights,
    raw_steps,
)
from ssmtune.ops.product_kernels import multiply


@triton.jit(do_not_specialize=["num_steps", "num_chunks"])
def leaving_kernel(dy_ptr, C_ptr, step_ptr, decay_ptr, seq_ptr, final_grad_ptr, grads_ptr, initial_grad_ptr, num_steps,
                   num_chunks, num_heads, per_group, P, N, dy_b, dy_t, dy_h, C_b, C_t, C_g, HAS_FINAL: tl.constexpr,
                   HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                   EXACT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write G of each chunk, and the gradient of the first state: walk back over the chunks with G in registers.

    Grid (blocks of P, blocks of N, batch * heads).
    """
    batch, head = (tl.program_id(2) // num_heads).to(tl.int64), tl.program_id(2) % num_heads
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, L)
    line = tl.program_id(2).to(tl.int64)
    dy_ptr += batch * dy_b + head * dy_h
    C_ptr += batch * C_b + head // per_group * C_g
    step_ptr += line * num_chunks * L
    decay_ptr += line * num_chunks * L
    at = p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    grad = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if HAS_FINAL:
        grad = tl.load(final_grad_ptr + line * P * N + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SEQ:
        seq_ptr += batch * num_steps
    for back in tl.range(num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - back
        t = chunk * L + i
        weight, _, keep = edge_weights(step_ptr + chunk * L, decay_ptr + chunk * L, L)
        if HAS_SEQ:
            own = tl.load(seq_ptr + tl.minimum(t, num_steps - 1))
            earlier = tl.load(seq_ptr + tl.minimum(tl.maximum(t - 1, 0), num_steps - 1))
            before = tl.sum(tl.where(i == 0, earlier, 0))
            weight = tl.where(own == before, weight, 0.0)
            keep = tl.where(tl.sum(tl.where(i == L - 1, own, 0)) == before, keep, 0.0)
        # As [P, L]: a block that is turned afterwards waits in registers, which Triton 3.6 does not let run ahead here.
        dy = load_block(dy_ptr, p, t, P, num_steps, 1, dy_t)
        c = load_block(C_ptr, t, n, num_steps, N, C_t, 1)
        tl.store(grads_ptr + (line * num_chunks + chunk) * P * N + at, grad, mask=inside)
        grad = grad * keep + multiply(dy.to(tl.float32) * weight[None, :], c, EXACT)
    tl.store(initial_grad_ptr + line * P * N + at, grad, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def inputs_kernel(x_ptr, dy_ptr, B_ptr, D_ptr, scores_ptr, grads_ptr, step_ptr, decay_ptr, seq_ptr, dx_ptr, direct_ptr,
                  dD_ptr, num_steps, num_heads, per_group, P, N, x_b, x_t, x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g,
                  dx_b, dx_t, dx_h, HAS_D: tl.constexpr, HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write dx, the part of ddt that comes through dt x (`direct` [B, H, T']), and dD by chunk [B, c, H].

    Grid (chunks, batch * heads).
    """
    chunk, batch, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    num_chunks, group = tl.num_programs(0), head // per_group
    i, p = tl.arange(0, L), tl.arange(0, BLOCK_P)
    t = chunk * L + i
    line = tl.program_id(1).to(tl.int64) * num_chunks * L + chunk * L
    B_ptr += batch.to(tl.int64) * B_b + group * B_g
    grads_ptr += (tl.program_id(1).to(tl.int64) * num_chunks + chunk) * P * N
    acc = tl.zeros([L, BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b = load_block(B_ptr, t, n, num_steps, N, B_t, 1)
        grad = load_block(grads_ptr, p, n, P, N, N, 1)
        acc += multiply(b, tl.trans(grad), EXACT)
    # The state's weight without dt: dt x is the input here.
    decay = tl.load(decay_ptr + line + i)
    to_end = tl.exp(tl.load(decay_ptr + line + L - 1) - decay)
    if HAS_SEQ:
        own, last, _ = documents(seq_ptr, batch, chunk, num_steps, L)
        to_end = tl.where(own == last, to_end, 0.0)
    acc *= to_end[:, None]
    scores_ptr += ((batch * num_chunks + chunk) * (num_heads // per_group) + group).to(tl.int64) * L * L
    weight = pair_weights(decay_ptr + line, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
    weight *= tl.load(scores_ptr + i[:, None] * L + i[None, :])
    dy = load_block(dy_ptr + batch.to(tl.int64) * dy_b + head * dy_h, t, p, num_steps, P, dy_t, 1)
    acc += multiply(tl.trans(weight), dy, EXACT)
    x = load_block(x_ptr + batch.to(tl.int64) * x_b + head * x_h, t, p, num_steps, P, x_t, 1).to(tl.float32)
    tl.store(direct_ptr + line + i, tl.sum(acc * x, axis=1))
    dx = acc * tl.load(step_ptr + line + i)[:, None]
    if HAS_D:
        dx += tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
        tl.store(dD_ptr + (batch * num_chunks + chunk) * num_heads + head, tl.sum(dy.to(tl.float32) * x))
    where = batch.to(tl.int64) * dx_b + t[:, None].to(tl.int64) * dx_t + head * dx_h + p[None, :]
    tl.store(dx_ptr + where, dx, mask=(t[:, None] < num_steps) & (p[None, :] < P))


@triton.jit(do_not_specialize=["num_steps"])
def scores_back_kernel(x_ptr, dy_ptr, scores_ptr, step_ptr, decay_ptr, seq_ptr, out_ptr, between_ptr, num_steps,
                       num_heads, per_group, P, x_b, x_t, x_h, dy_b, dy_t, dy_h, SPLITS: tl.constexpr,
                       HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write the gradient of the scores, summed over a share of the group's heads, [splits, B, c, G, L, L]; and

    `between` [B, H, T']: for each step, the pairs in which it is the output minus those in which it is the input.
    Grid (chunks, batch * groups, splits).
    """
    num_groups = num_heads // per_group
    chunk, batch, group = tl.program_id(0), tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    num_chunks, split = tl.num_programs(0), tl.program_id(2)
    i, p = tl.arange(0, L), tl.arange(0, BLOCK_P)
    t = chunk * L + i
    cell = ((batch * num_chunks + chunk) * num_groups + group).to(tl.int64) * L * L
    square = i[:, None] * L + i[None, :]
    scores = tl.load(scores_ptr + cell + square)
    acc = tl.zeros([L, L], tl.float32)
    for member in range(split, per_group, SPLITS):
        head = group * per_group + member
        line = (batch * num_heads + head).to(tl.int64) * num_chunks * L + chunk * L
        x = load_block(x_ptr + batch.to(tl.int64) * x_b + head * x_h, t, p, num_steps, P, x_t, 1)
        dy = load_block(dy_ptr + batch.to(tl.int64) * dy_b + head * dy_h, t, p, num_steps, P, dy_t, 1)
        product = multiply(dy, tl.trans(x), EXACT)
        product *= pair_weights(decay_ptr + line, seq_ptr, batch, chunk, num_steps, HAS_SEQ, L)
        product *= tl.load(step_ptr + line + i)[None, :]
        acc += product
        product *= scores
        tl.store(between_ptr + line + i, tl.sum(product, axis=1) - tl.sum(product, axis=0))
    split_size = tl.num_programs(1).to(tl.int64) * num_chunks * L * L
    tl.store(out_ptr + split * split_size + cell + square, acc)


@triton.jit(do_not_specialize=["num_steps"])
def through_states_kernel(x_ptr, dy_ptr, B_ptr, C_ptr, states_ptr, grads_ptr, step_ptr, decay_ptr, seq_ptr, dB_ptr,
                          dC_ptr, after_ptr, before_ptr, through_ptr, num_steps, num_heads, per_group, P, N, x_b, x_t,
                          x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g, C_b, C_t, C_g, SPLITS: tl.constexpr,
                          HAS_SEQ: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                          EXACT: tl.constexpr):  # fmt: skip
    """Write what B and C get through the states, and how that depends on the decays.

    `dC` and `dB` [splits, B, T', G, N]: sums over a share of the group's heads of dy E, read at the chunk's start, and of
    x G, added at its end. Their products with C and B: `before` and `after` [blocks of N, B, H, T'], each output's share of
    the decay before it and each input's of the decay after it. `through` [B, H, blocks of N, c]: the gradient of the whole
    log decay due to what passes through the chunk. Grid (chunks, batch * groups, splits * blocks of N).
    """
    num_groups = num_heads // per_group
    chunk, batch, group = tl.program_id(0), tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    num_chunks, split, block = tl.num_programs(0), tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    i, p, n = tl.arange(0, L), tl.arange(0, BLOCK_P), block * BLOCK_N + tl.arange(0, BLOCK_N)
    t = chunk * L + i
    length, blocks = num_chunks * L, tl.num_programs(2) // SPLITS
    lines = (block * tl.num_programs(1) * per_group).to(tl.int64) * length
    x_ptr += batch.to(tl.int64) * x_b
    dy_ptr += batch.to(tl.int64) * dy_b
    b = load_block(B_ptr + batch.to(tl.int64) * B_b + group * B_g, t, n, num_steps, N, B_t, 1).to(tl.float32)
    c = load_block(C_ptr + batch.to(tl.int64) * C_b + group * C_g, t, n, num_steps, N, C_t, 1).to(tl.float32)
    dB, dC = tl.zeros([L, BLOCK_N], tl.float32), tl.zeros([L, BLOCK_N], tl.float32)
    for member in range(split, per_group, SPLITS):
        head = group * per_group + member
        line = (batch * num_heads + head).to(tl.int64)
        at = line * length + chunk * L
        from_start, to_end, keep = edge_weights(step_ptr + at, decay_ptr + at, L)
        if HAS_SEQ:
            own, last, before = documents(seq_ptr, batch, chunk, num_steps, L)
            from_start = tl.where(own == before, from_start, 0.0)
            to_end = tl.where(own == last, to_end, 0.0)
            keep = tl.where(last == before, keep, 0.0)
        cell = (line * num_chunks + chunk) * P * N
        entering = load_block(states_ptr + cell, p, n, P, N, N, 1)
        dy = load_block(dy_ptr + head * dy_h, t, p, num_steps, P, dy_t, 1)
        part = multiply(dy, entering, EXACT) * from_start[:, None]
        dC += part
        tl.store(before_ptr + lines + at + i, tl.sum(part * c, axis=1))
        grad = load_block(grads_ptr + cell, p, n, P, N, N, 1)
        x = load_block(x_ptr + head * x_h, t, p, num_steps, P, x_t, 1)
        part = multiply(x, grad, EXACT) * to_end[:, None]
        dB += part
        tl.store(after_ptr + lines + at + i, tl.sum(part * b, axis=1))
        through = tl.sum(grad.to(tl.float32) * entering.to(tl.float32)) * keep
        tl.store(through_ptr + (line * blocks + block) * num_chunks + chunk, through)
    where = (((split * (tl.num_programs(1) // num_groups) + batch).to(tl.int64) * length + t[:, None]) * num_groups
             + group) * N + n[None, :]  # fmt: skip
    inside = (n < N)[None, :] & (t >= 0)[:, None]
    tl.store(dB_ptr + where, dB, mask=inside)
    tl.store(dC_ptr + where, dC, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def readouts_kernel(scores_grad_ptr, through_B_ptr, through_C_ptr, B_ptr, C_ptr, dB_ptr, dC_ptr, num_steps,
                    num_groups, N, B_b, B_t, B_g, C_b, C_t, C_g, dB_b, dB_t, dB_g, dC_b, dC_t, dC_g,
                    SPLITS: tl.constexpr, L: tl.constexpr,
                    BLOCK_N: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Write dB and dC: what came through the states plus what came through the scores.

    Grid (chunks, batch * groups, blocks of N).
    """
    chunk, batch, group = tl.program_id(0), tl.program_id(1) // num_groups, tl.program_id(1) % num_groups
    num_chunks = tl.num_programs(0)
    i, n = tl.arange(0, L), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = chunk * L + i
    cell = ((batch * num_chunks + chunk) * num_groups + group).to(tl.int64) * L * L + i[:, None] * L + i[None, :]
    scores_grad = tl.zeros([L, L], tl.float32)
    dB, dC = tl.zeros([L, BLOCK_N], tl.float32), tl.zeros([L, BLOCK_N], tl.float32)
    padded = ((batch.to(tl.int64) * num_chunks * L + t[:, None]) * num_groups + group) * N + n[None, :]
    filled = (n < N)[None, :] & (t >= 0)[:, None]
    for split in range(SPLITS):
        shares = tl.num_programs(1).to(tl.int64) * num_chunks * L * split
        scores_grad += tl.load(scores_grad_ptr + shares * L + cell)
        dB += tl.load(through_B_ptr + shares * N + padded, mask=filled, other=0.0)
        dC += tl.load(through_C_ptr + shares * N + padded, mask=filled, other=0.0)
    b = load_block(B_ptr + batch.to(tl.int64) * B_b + group * B_g, t, n, num_steps, N, B_t, 1)
    c = load_block(C_ptr + batch.to(tl.int64) * C_b + group * C_g, t, n, num_steps, N, C_t, 1)
    dC += multiply(scores_grad, b, EXACT)
    dB += multiply(tl.trans(scores_grad), c, EXACT)
    batch, t = batch.to(tl.int64), t.to(tl.int64)
    inside = (n < N)[None, :] & (t < num_steps)[:, None]
    tl.store(dB_ptr + batch * dB_b + group * dB_g + t[:, None] * dB_t + n[None, :], dB, mask=inside)
    tl.store(dC_ptr + batch * dC_b + group * dC_g + t[:, None] * dC_t + n[None, :], dC, mask=inside)


@triton.jit(do_not_specialize=["num_steps"])
def steps_back_kernel(dt_ptr, bias_ptr, A_ptr, mask_ptr, step_ptr, direct_ptr, between_ptr, before_ptr, after_ptr,
                      through_ptr, ddt_ptr, sums_ptr, num_steps, num_heads, ddt_b, ddt_t, ddt_h, low,
                      high, dt_b, dt_t, dt_h,
                      SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
                      BLOCKS_N: tl.constexpr, L: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Write ddt [B, T, H], and dA and dbias by chunk, [2, B, c, H]. Grid (chunks, blocks of heads, batch).

    What comes in blocks of the state's columns is summed here.
    """
    chunk, batch, num_chunks = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * L + tl.arange(0, L)
    lines = (batch * num_heads + h)[None, :] * num_chunks * L + t[:, None]
    real = (h < num_heads)[None, :] & (t >= 0)[:, None]
    outputs = tl.load(between_ptr + lines, mask=real, other=0.0)
    after, through = tl.zeros([L, BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32)
    every = tl.num_programs(2).to(tl.int64) * num_heads * num_chunks
    for block in range(BLOCKS_N):
        outputs += tl.load(before_ptr + block * every * L + lines, mask=real, other=0.0)
        after += tl.load(after_ptr + block * every * L + lines, mask=real, other=0.0)
        cell = ((batch * num_heads + h) * BLOCKS_N + block) * num_chunks + chunk
        through += tl.load(through_ptr + cell, mask=h < num_heads, other=0.0)
    # A step's decay lies before its own output and after its own input.
    decay_grad = tl.cumsum(outputs, axis=0, reverse=True) + (tl.cumsum(after, axis=0) - after) + through[None, :]
    step = tl.load(step_ptr + lines, mask=real, other=0.0)
    sums_ptr += (batch * num_chunks + chunk) * num_heads + h
    tl.store(sums_ptr, tl.sum(step * decay_grad, axis=0), mask=h < num_heads)
    A = tl.load(A_ptr + h, mask=h < num_heads, other=0.0).to(tl.float32)
    ddt = tl.load(direct_ptr + lines, mask=real, other=0.0) + A[None, :] * decay_grad
    v, counts = raw_steps(dt_ptr + batch * dt_b, bias_ptr, mask_ptr, batch, t, h, num_steps, num_heads,
                          dt_t, dt_h, HAS_BIAS, HAS_MASK)  # fmt: skip
    value = v
    if SOFTPLUS:
        value = log1p_exp(v)
    if LIMITED:
        counts = counts & (value >= low) & (value <= high)
    if SOFTPLUS:
        ddt *= 1 / (1 + tl.exp(-v))
    ddt = tl.where(counts, ddt, 0.0)
    if HAS_BIAS:
        tl.store(sums_ptr + every, tl.sum(ddt, axis=0), mask=h < num_heads)
    where = batch * ddt_b + t[:, None].to(tl.int64) * ddt_t + h[None, :] * ddt_h
    tl.store(ddt_ptr + where, ddt, mask=(h < num_heads)[None, :] & (t < num_steps)[:, None])
