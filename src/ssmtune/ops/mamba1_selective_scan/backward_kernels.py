"""Triton kernels of the Mamba-1 scan's backward pass; shapes and names as in `forward_kernels`.

Write E for the state that enters a chunk and G for the gradient of the state that leaves it, through all that comes later.
"""

import triton
import triton.language as tl

from ssmtune.ops.mamba1_selective_scan.forward_kernels import (
    advance,
    kept,
    kept_over_chunk,
    load_channels,
    load_row,
    load_tile,
    step_size,
)


@triton.jit(do_not_specialize=["num_steps", "dt_b", "C_b", "z_b", "dy_b"])
def chunk_back_kernel(dt_ptr, bias_ptr, A_ptr, C_ptr, z_ptr, dy_ptr, flags_ptr, grads_ptr, num_steps, D, N, dt_b,
                      dt_t, C_b, C_t, z_b, z_t, dy_b, dy_t, A_d, A_n, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr,
                      HAS_Z: tl.constexpr, HAS_FLAGS: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """Write the gradient of E as the chunk's own outputs see it, [B, c, N, D]. Grid (blocks of D, chunks, batch)."""
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    first, batch = tl.program_id(1) * L, tl.program_id(2).to(tl.int64)
    A, bias = load_tile(A_ptr, n, d, N, D, A_n, A_d), load_channels(bias_ptr, d, D, HAS_BIAS)
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    length = tl.minimum(L, num_steps - first)
    for back in range(length):
        t = first + length - 1 - back
        _, _, step = step_size(dt_ptr + batch * dt_b, bias, flags_ptr, t, d, num_steps, D, dt_t, SOFTPLUS,
                               HAS_FLAGS)  # fmt: skip
        dy = load_row(dy_ptr + batch * dy_b, t, d, dy_t, d < D)
        if HAS_Z:
            z = load_row(z_ptr + batch * z_b, t, d, z_t, d < D)
            dy *= z / (1 + tl.exp(-z))
        c = load_row(C_ptr + batch * C_b, t, n, C_t, n < N)
        grad = (grad + c[:, None] * dy[None, :]) * tl.exp(A * step[None, :])
        if HAS_FLAGS:
            grad *= kept(flags_ptr, t, num_steps)
    line = batch * tl.num_programs(1) + tl.program_id(1)
    inside = (n[:, None] < N) & (d[None, :] < D)
    tl.store(grads_ptr + (line * N + n[:, None]) * D + d[None, :], grad, mask=inside)


@triton.jit(do_not_specialize=["num_steps", "num_chunks"])
def pass_back_kernel(grads_ptr, sums_ptr, A_ptr, final_ptr, initial_ptr, flags_ptr, num_steps, num_chunks, D, N, A_d,
                     A_n, HAS_FINAL: tl.constexpr, HAS_FLAGS: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Turn what each chunk's outputs make of the gradient of E into G, in place; write the initial state's [B, N, D].

    Grid (blocks of D, batch).
    """
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    batch = tl.program_id(1).to(tl.int64)
    A = load_tile(A_ptr, n, d, N, D, A_n, A_d)
    inside = (n[:, None] < N) & (d[None, :] < D)
    cell = n[:, None] * D + d[None, :]
    grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_FINAL:
        grad = load_tile(final_ptr + batch * N * D, n, d, N, D, D, 1)
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    for back in tl.range(num_chunks, num_stages=STAGES):
        chunk = num_chunks - 1 - back
        line = batch * num_chunks + chunk
        own = tl.load(grads_ptr + line * N * D + cell, mask=inside, other=0.0)
        total = tl.load(sums_ptr + line * D + d, mask=d < D, other=0.0)
        tl.store(grads_ptr + line * N * D + cell, grad, mask=inside)
        if HAS_FLAGS:
            grad *= kept_over_chunk(flags_ptr, chunk * L, num_steps, L)
        grad = grad * tl.exp(A * total[None, :]) + own
    tl.store(initial_ptr + batch * N * D + cell, grad, mask=inside)


@triton.jit(do_not_specialize=["num_steps", "num_blocks", "x_b", "dt_b", "B_b", "C_b", "z_b", "dy_b"])
def inputs_kernel(x_ptr, dt_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, skip_ptr, z_ptr, dy_ptr, flags_ptr, states_ptr,
                  grads_ptr, dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, dskip_ptr, dbias_ptr, num_steps, num_blocks, D,
                  N, x_b, x_t, dt_b, dt_t, B_b, B_t, C_b, C_t, z_b, z_t, dy_b, dy_t, A_d, A_n,
                  SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_Z: tl.constexpr,
                  HAS_FLAGS: tl.constexpr, L: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """Write dx, ddt, dz [B, T, D] from E and G; dA by chunk over G; dD and dbias by chunk [B, c, D].

    `dB` and `dC` [shares of D, B, T, N] are sums over the `num_blocks` blocks of channels that a program goes through.
    Grid (shares of D, chunks, batch).
    """
    n, first, batch = tl.arange(0, BLOCK_N), tl.program_id(1) * L, tl.program_id(2).to(tl.int64)
    line = batch * tl.num_programs(1) + tl.program_id(1)
    x_ptr, dt_ptr, dy_ptr = x_ptr + batch * x_b, dt_ptr + batch * dt_b, dy_ptr + batch * dy_b
    B_ptr, C_ptr = B_ptr + batch * B_b, C_ptr + batch * C_b
    if HAS_FLAGS:
        flags_ptr += batch * num_steps
    for block in range(num_blocks):
        d = (tl.program_id(0) * num_blocks + block) * BLOCK_D + tl.arange(0, BLOCK_D)
        A, bias = load_tile(A_ptr, n, d, N, D, A_n, A_d), load_channels(bias_ptr, d, D, HAS_BIAS)
        skip = load_channels(skip_ptr, d, D, HAS_SKIP)
        entering = load_tile(states_ptr + line * N * D, n, d, N, D, D, 1)
        grad = load_tile(grads_ptr + line * N * D, n, d, N, D, D, 1)
        dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dskip, dbias = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        middle = entering
        for i in range(L // 2):
            middle, _, _ = advance(middle, A, bias, x_ptr, dt_ptr, B_ptr, flags_ptr, first + i, d, n, num_steps, D, N,
                                   x_t, dt_t, B_t, SOFTPLUS, HAS_FLAGS)  # fmt: skip
        for back in range(L // K):
            # The states of K steps are kept at a time; those since the chunk's start or middle are walked over again.
            num_before = L - K - back * K
            since = num_before // (L // 2) * (L // 2)
            start, state = first + num_before, entering
            if since > 0:
                state = middle
            for i in range(num_before - since):
                state, _, _ = advance(state, A, bias, x_ptr, dt_ptr, B_ptr, flags_ptr, first + since + i, d, n,
                                      num_steps, D, N, x_t, dt_t, B_t, SOFTPLUS, HAS_FLAGS)  # fmt: skip
            before = (state,)
            for k in tl.static_range(K):
                state, _, _ = advance(state, A, bias, x_ptr, dt_ptr, B_ptr, flags_ptr, start + k, d, n, num_steps, D,
                                      N, x_t, dt_t, B_t, SOFTPLUS, HAS_FLAGS)  # fmt: skip
                before = before + (state,)
            for k in tl.static_range(K):
                t = start + (K - 1 - k)
                inside, read = d < tl.where(t < num_steps, D, 0), n < tl.where(t < num_steps, N, 0)
                raw, counts, step = step_size(dt_ptr, bias, flags_ptr, t, d, num_steps, D, dt_t, SOFTPLUS,
                                              HAS_FLAGS)  # fmt: skip
                x, dy = load_row(x_ptr, t, d, x_t, inside), load_row(dy_ptr, t, d, dy_t, inside)
                b, c = load_row(B_ptr, t, n, B_t, read), load_row(C_ptr, t, n, C_t, read)
                here = (batch * num_steps + t) * D + d
                if HAS_Z:
                    z = load_row(z_ptr + batch * z_b, t, d, z_t, inside)
                    gate = 1 / (1 + tl.exp(-z))
                    y = tl.sum(before[K - k] * c[:, None], axis=0) + skip * x
                    tl.store(dz_ptr + here, dy * y * gate * (1 + z * (1 - gate)), mask=inside)
                    dy *= z * gate
                grad += c[:, None] * dy[None, :]
                into = tl.sum(grad * b[:, None], axis=0)
                # What earlier blocks of this program added; none for the first.
                share = ((tl.program_id(0) * tl.num_programs(2) + batch) * num_steps + t) * N + n
                added = read & (n < tl.where(block > 0, N, 0))
                dB = tl.load(dB_ptr + share, mask=added, other=0.0) + tl.sum(grad * (step * x)[None, :], axis=1)
                dC = tl.load(dC_ptr + share, mask=added, other=0.0) + tl.sum(before[K - k] * dy[None, :], axis=1)
                tl.store(dB_ptr + share, dB, mask=read)
                tl.store(dC_ptr + share, dC, mask=read)
                tl.store(dx_ptr + here, into * step + skip * dy, mask=inside)
                dskip += dy * x
                grad *= tl.exp(A * step[None, :])
                if HAS_FLAGS:
                    grad *= kept(flags_ptr, t, num_steps)
                along = grad * before[K - 1 - k]
                dA += along * step[None, :]
                ddt = into * x + tl.sum(along * A, axis=0)
                if SOFTPLUS:
                    ddt *= 1 / (1 + tl.exp(-raw))
                ddt = tl.where(counts, ddt, 0.0)
                dbias += ddt
                tl.store(ddt_ptr + here, ddt, mask=inside)
        tile = (n[:, None] < N) & (d[None, :] < D)
        tl.store(grads_ptr + (line * N + n[:, None]) * D + d[None, :], dA, mask=tile)
        tl.store(dskip_ptr + line * D + d, dskip, mask=d < D)
        tl.store(dbias_ptr + line * D + d, dbias, mask=d < D)
        # The next block reads the sums that other threads of this program have written.
        tl.debug_barrier()
