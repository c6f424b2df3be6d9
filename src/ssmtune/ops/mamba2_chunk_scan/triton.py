"""Mamba-2 scan on NVIDIA GPUs: chunked as in the reference, in Triton.

Inputs, step sizes and scores are kept for the backward pass; states are computed again.
Memory for a pass: two states per chunk of `CHUNK` steps, and the scores, T * CHUNK per group.
B and C are read per group and never copied out to heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.launch import launch, shared_memory
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
    shape_of,
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
    shape = shape_of(x_BTHP, B_BTGN, dt_softplus, dt_limit)
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    mask = None if padding_mask is None else padding_mask.to(torch.int8).contiguous()
    found: tuple[torch.Tensor, torch.Tensor] = _Scan.apply(  # type: ignore[no-untyped-call]
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, dt_bias_H, initial_states_BHPN, seq, mask, shape
    )
    return found


@dataclass(frozen=True)
class Inputs:
    """What a scan reads, as the kernels take it: x, B and C with a contiguous last dimension, seq int32 and mask int8."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    bias: torch.Tensor | None
    initial: torch.Tensor | None
    seq: torch.Tensor | None
    mask: torch.Tensor | None


Small = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What both passes need and is small beside the inputs: step sizes and decays [B, H, T'], and the scores."""


def run_forward(shape: Shape, t: Inputs) -> tuple[torch.Tensor, torch.Tensor, Small]:
    """Return the outputs [B, T, H, P], the final state [B, H, P, N], fp32, and what `run_backward` takes.

    No gradient is followed.
    """
    step, decay = step_sizes(shape, t.dt, t.bias, t.A, t.mask)
    scores = chunk_scores(shape, t.B, t.C)
    states, final = entering_states(shape, t.x, t.B, step, decay, t.seq, t.initial)
    y = torch.empty(t.x.shape, dtype=t.x.dtype, device=t.x.device)
    launch(output_kernel, (shape.chunks, shape.batch * shape.heads),
        t.x, t.C, t.D, scores, states, step, decay, t.seq, y, shape.steps, shape.heads,
        shape.heads // shape.groups, shape.width, shape.state, *t.x.stride()[:3], *t.C.stride()[:3],
        HAS_D=t.D is not None, HAS_SEQ=t.seq is not None, **shape.blocks(), **LAUNCH,
    )  # fmt: skip
    return y, final, (step, decay, scores)


@dataclass(frozen=True)
class Into:
    """Where the gradients of x, B, C and dt are written: any strides, of the first three a contiguous last dimension."""

    dx: torch.Tensor
    dB: torch.Tensor
    dC: torch.Tensor
    ddt: torch.Tensor


def run_backward(
    s: Shape, t: Inputs, small: Small, dy: torch.Tensor, final_grad: torch.Tensor | None, into: Into
) -> tuple[Any, ...]:
    """Write the gradients of x, B, C and dt; return those of A, D, the bias and the initial state, None for what is absent.

    States are computed again.
    """
    device, has_seq = t.x.device, t.seq is not None
    step, decay, scores = small
    states, _ = entering_states(s, t.x, t.B, step, decay, t.seq, t.initial)
    grads, initial_grad = leaving_gradients(s, dy, t.C, step, decay, t.seq, final_grad)
    per_group, length = s.heads // s.groups, s.chunks * stages.CHUNK
    by_head, by_group = (s.chunks, s.batch * s.heads), (s.chunks, s.batch * s.groups)

    def fp32(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.float32, device=device)

    # Of A, the bias and D by chunk: one sum for the three.
    direct, sums = fp32(s.batch, s.heads, length), fp32(3, s.batch, s.chunks, s.heads)
    launch(inputs_kernel, by_head,
        t.x, dy, t.B, t.D, scores, grads, step, decay, t.seq, into.dx, direct, sums[2], s.steps, s.heads, per_group, s.width,
        s.state, *t.x.stride()[:3], *dy.stride()[:3], *t.B.stride()[:3], *into.dx.stride()[:3], HAS_D=t.D is not None,
        HAS_SEQ=has_seq, **s.blocks(), **LAUNCH,
    )  # fmt: skip
    ahead = s.over_heads(shared_memory(t.x.device))
    scores_grad = fp32(SPLITS, s.batch, s.chunks, s.groups, stages.CHUNK, stages.CHUNK)
    between = torch.empty_like(direct)
    products = {key: value for key, value in s.blocks().items() if key != "BLOCK_N"}
    launch(scores_back_kernel, by_group + (SPLITS,),
        t.x, dy, scores, step, decay, t.seq, scores_grad, between, s.steps, s.heads, per_group, s.width,
        *t.x.stride()[:3], *dy.stride()[:3], SPLITS=SPLITS, HAS_SEQ=has_seq, **products, **ahead,
    )  # fmt: skip

    part_B, part_C = (fp32(SPLITS, s.batch, length, s.groups, s.state) for _ in range(2))
    after, before = (fp32(s.blocks_n, s.batch, s.heads, length) for _ in range(2))
    through = fp32(s.batch, s.heads, s.blocks_n, s.chunks)
    launch(through_states_kernel, by_group + (SPLITS * s.blocks_n,),
        t.x, dy, t.B, t.C, states, grads, step, decay, t.seq, part_B, part_C, after, before, through, s.steps, s.heads,
        per_group, s.width, s.state, *t.x.stride()[:3], *dy.stride()[:3], *t.B.stride()[:3], *t.C.stride()[:3],
        SPLITS=SPLITS, HAS_SEQ=has_seq, **s.blocks(), **ahead,
    )  # fmt: skip
    launch(readouts_kernel, by_group + (s.blocks_n,),
        scores_grad, part_B, part_C, t.B, t.C, into.dB, into.dC, s.steps, s.groups, s.state, *t.B.stride()[:3],
        *t.C.stride()[:3], *into.dB.stride()[:3], *into.dC.stride()[:3], SPLITS=SPLITS, L=stages.CHUNK,
        BLOCK_N=s.block_n, EXACT=s.exact, **LAUNCH,
    )  # fmt: skip
    launch(steps_back_kernel, (s.chunks, -(-s.heads // 16), s.batch),
        t.dt, t.bias, t.A, t.mask, step, direct, between, before, after, through, into.ddt, sums, s.steps, s.heads,
        *into.ddt.stride(), BLOCKS_N=s.blocks_n, **s.steps_options(t.dt, t.bias, t.mask), **LAUNCH,
    )  # fmt: skip
    dA, dbias, dD = sums.sum((1, 2)).unbind()
    return (
        dA.to(t.A.dtype),
        None if t.D is None else dD.to(t.D.dtype),
        None if t.bias is None else dbias.to(t.bias.dtype),
        None if t.initial is None else initial_grad.to(t.initial.dtype),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, shape = given
        y, final, small = run_forward(shape, _dense(*tensors))
        ctx.save_for_backward(*tensors, *small)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, final_grad: Any) -> tuple[Any, ...]:
        *tensors, step, decay, scores = ctx.saved_tensors
        t = _dense(*tensors)
        into = Into(*(torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (t.x, t.B, t.C, t.dt)))
        dy = torch.zeros_like(into.dx) if dy is None else dense_rows(dy)
        dA, dD, dbias, initial_grad = run_backward(ctx.shape, t, (step, decay, scores), dy, final_grad, into)
        return into.dx, into.ddt, dA, into.dB, into.dC, dD, dbias, initial_grad, None, None, None


def _dense(x: Any, dt: Any, A: Any, B: Any, C: Any, *others: Any) -> Inputs:
    return Inputs(dense_rows(x), dt, A, dense_rows(B), dense_rows(C), *others)
