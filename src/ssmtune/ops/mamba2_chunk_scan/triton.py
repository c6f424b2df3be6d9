"""Mamba-2 scan on NVIDIA GPUs: chunked as in the reference, in Triton.

Only the inputs are kept for the backward pass; states and scores are computed again.
Memory for a pass: two fp32 states per chunk of `CHUNK` steps, and the scores, T * CHUNK per group.
B and C are read per group and never copied out to heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.mamba2_chunk_scan import stages
from ssmtune.ops.mamba2_chunk_scan.backward_kernels import (
    inputs_kernel,
    readouts_kernel,
    scores_back_kernel,
    steps_back_kernel,
    through_states_kernel,
)
from ssmtune.ops.mamba2_chunk_scan.forward_kernels import output_kernel
from ssmtune.ops.mamba2_chunk_scan.stages import (
    LAUNCH,
    Shape,
    chunk_scores,
    dense_rows,
    entering_states,
    leaving_gradients,
    step_sizes,
)

SPLITS = 4
"""Shares into which a group's heads are divided where a sum runs over them, to have work for every multiprocessor."""


def mamba2_chunk_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    *,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    initial_states_BHPN: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    batch, num_steps, num_heads, width = x_BTHP.shape
    num_groups, state = B_BTGN.shape[2:]
    # Triton's interpreter, which is what runs on a CPU, multiplies fp32 only.
    exact = x_BTHP.dtype == torch.float32 or not x_BTHP.is_cuda
    shape = Shape(batch, num_steps, num_heads, width, num_groups, state, dt_softplus, dt_limit, exact)
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    mask = None if padding_mask is None else padding_mask.to(torch.int8).contiguous()
    found: tuple[torch.Tensor, torch.Tensor] = _Scan.apply(  # type: ignore[no-untyped-call]
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, dt_bias_H, initial_states_BHPN, shape, seq, mask
    )
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        bias: Any,
        initial: Any,
        shape: Shape,
        seq: Any,
        mask: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, D, bias, initial, seq, mask)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        x, B, C = dense_rows(x), dense_rows(B), dense_rows(C)
        step, decay = step_sizes(shape, dt, bias, A, mask)
        states, final = entering_states(shape, x, B, step, decay, seq, initial)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        per_group = shape.heads // shape.groups
        output_kernel[(shape.chunks, shape.batch * shape.heads)](
            x, C, D, chunk_scores(shape, B, C), states, step, decay, seq, y, shape.steps, shape.heads, per_group,
            shape.width, shape.state, *x.stride()[:3], *C.stride()[:3], HAS_D=D is not None, HAS_SEQ=seq is not None,
            **shape.blocks(), **LAUNCH,
        )  # fmt: skip
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, final_grad: Any) -> tuple[Any, ...]:
        x, dt, A, B, C, D, bias, initial, seq, mask = ctx.saved_tensors
        s: Shape = ctx.shape
        xr, Br, Cr = dense_rows(x), dense_rows(B), dense_rows(C)
        dy = torch.zeros_like(xr) if dy is None else dense_rows(dy)
        step, decay = step_sizes(s, dt, bias, A, mask)
        states, _ = entering_states(s, xr, Br, step, decay, seq, initial)
        grads, through, initial_grad = leaving_gradients(s, dy, Cr, states, step, decay, seq, final_grad)
        scores = chunk_scores(s, Br, Cr)
        per_group, length, has_seq = s.heads // s.groups, s.chunks * stages.CHUNK, seq is not None
        by_head, by_group = (s.chunks, s.batch * s.heads), (s.chunks, s.batch * s.groups)

        def fp32(*dims: int) -> torch.Tensor:
            return torch.empty(dims, dtype=torch.float32, device=x.device)

        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        direct, dD = fp32(s.batch, s.heads, length), fp32(s.batch, s.heads, s.chunks)
        inputs_kernel[by_head](
            xr, dy, Br, D, scores, grads, step, decay, seq, dx, direct, dD, s.steps, s.heads, per_group, s.width,
            s.state, *xr.stride()[:3], *dy.stride()[:3], *Br.stride()[:3], HAS_D=D is not None, HAS_SEQ=has_seq,
            **s.blocks(), **LAUNCH,
        )  # fmt: skip
        scores_grad = fp32(SPLITS, s.batch, s.chunks, s.groups, stages.CHUNK, stages.CHUNK)
        between = torch.empty_like(direct)
        products = {key: value for key, value in s.blocks().items() if key != "BLOCK_N"}
        scores_back_kernel[by_group + (SPLITS,)](
            xr, dy, scores, step, decay, seq, scores_grad, between, s.steps, s.heads, per_group, s.width,
            *xr.stride()[:3], *dy.stride()[:3], SPLITS=SPLITS, HAS_SEQ=has_seq, **products, **LAUNCH,
        )  # fmt: skip

        def through_states(rows: Any, over: Any, cols: Any, at_end: bool) -> tuple[torch.Tensor, torch.Tensor]:
            part = fp32(SPLITS, s.batch, length, s.groups, s.state)
            along = fp32(s.blocks_n, s.batch, s.heads, length)
            through_states_kernel[by_group + (SPLITS * s.blocks_n,)](
                rows, over, cols, step, decay, seq, part, along, s.steps, s.heads, per_group, s.width, s.state,
                *rows.stride()[:3], *cols.stride()[:3], SPLITS=SPLITS, AT_END=at_end, HAS_SEQ=has_seq, **s.blocks(),
                **LAUNCH,
            )  # fmt: skip
            return part, along[0] if s.blocks_n == 1 else along.sum(0)

        part_C, before = through_states(dy, states, Cr, False)
        part_B, after = through_states(xr, grads, Br, True)
        dB, dC = (torch.empty(B.shape, dtype=t.dtype, device=x.device) for t in (B, C))
        readouts_kernel[by_group + (s.blocks_n,)](
            scores_grad, part_B, part_C, Br, Cr, dB, dC, s.steps, s.groups, s.state, *Br.stride()[:3],
            *Cr.stride()[:3], SPLITS=SPLITS, L=stages.CHUNK, BLOCK_N=s.block_n, EXACT=s.exact, **LAUNCH,
        )  # fmt: skip
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
        dA, dbias = fp32(s.batch, s.chunks, s.heads), fp32(s.batch, s.chunks, s.heads)
        steps_back_kernel[(s.chunks, -(-s.heads // 16), s.batch)](
            dt, bias, A, mask, step, direct, between, before, after, through, ddt, dA, dbias, s.steps, s.heads,
            **s.steps_options(dt, bias, mask), **LAUNCH,
        )  # fmt: skip
        return (
            dx, ddt, dA.sum((0, 1)).to(A.dtype), dB, dC,
            None if D is None else dD.sum((0, 2)).to(D.dtype),
            None if bias is None else dbias.sum((0, 1)).to(bias.dtype),
            None if initial is None else initial_grad.to(initial.dtype),
            None, None, None,
        )  # fmt: skip
