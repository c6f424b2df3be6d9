"""The gated delta rule on NVIDIA GPUs: chunked as in the reference, in Triton, for one decay per head.

Only the inputs are kept for the backward pass; what chunks do to a state, and the states, are computed again.
Memory for a pass, for each value head: two states per chunk, and about as much again for w and u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_delta_rule.backward_kernels import (
    delta_couplings_back_kernel,
    delta_leaving_kernel,
    delta_reads_back_kernel,
    delta_reads_kernel,
)
from ssmtune.ops.gated_delta_rule.forward_kernels import delta_output_kernel
from ssmtune.ops.gated_delta_rule.stages import Inputs, Shape, through_chunks
from ssmtune.ops.launch import launch
from ssmtune.ops.mamba2_chunk_scan.stages import dense_rows
from ssmtune.ops.precision import multiplies_exactly


def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state_BHKV: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's function with the reference's arguments, for a decay per head; fp32 and bf16."""
    g, beta = g.float(), beta_BTH.float()
    if padding_mask is not None:
        mask = padding_mask.to(g.dtype)[:, :, None]
        g, beta = g * mask, beta * mask
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    batch, num_steps, key_heads, key = q_BTHK.shape
    heads, value = v_BTHV.shape[2:]
    shape = Shape(
        batch=batch,
        steps=num_steps,
        heads=heads,
        per_key=heads // key_heads,
        key=key,
        value=value,
        scale=key**-0.5 if scale is None else scale,
        norm=qk_l2norm,
        has_seq=seq is not None,
        exact=multiplies_exactly(q_BTHK),
    )
    found: tuple[torch.Tensor, torch.Tensor] = _Rule.apply(  # type: ignore[no-untyped-call]
        q_BTHK, k_BTHK, v_BTHV, g, beta, initial_state_BHKV, seq, shape
    )
    return found


def run_forward(s: Shape, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [B, T, H, V] in the dtype of q and the final state [B, H, K, V], fp32."""
    q, k, v, g, _, _, seq = inputs
    c = through_chunks(s, inputs)
    y = torch.empty(v.shape, dtype=q.dtype, device=v.device)
    launch(delta_output_kernel, s.cells,
        q, k, g, seq, c.start, c.written, c.states, y, *s.sizes(), s.scale, *q.stride()[:3], *k.stride()[:3],
        *g.stride(), **s.per_cell(),
    )  # fmt: skip
    return y, c.final


def run_backward(s: Shape, inputs: Inputs, dy: torch.Tensor, final_grad: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of q and k by value head [B, T, H, K], v, g, beta and the initial state."""
    q, k, v, g, beta, _, seq = inputs
    c = through_chunks(s, inputs)
    written_grad, q_start, grads = (
        s.empty(k, *dims, narrow=True) for dims in ((s.chunk, s.value), (s.chunk, s.key), (s.key, s.value))
    )
    strides = *q.stride()[:3], *k.stride()[:3], *g.stride(), *dy.stride()[:3]
    launch(delta_reads_kernel, s.cells,
        q, k, g, seq, dy, c.start, written_grad, q_start, *s.sizes(), s.scale, *strides, **s.per_cell(),
    )  # fmt: skip
    initial_grad = torch.empty_like(c.final)
    grid, options = s.walk()
    launch(delta_leaving_kernel, grid,
        c.w, c.k_end, q_start, c.start, dy, None if final_grad is None else final_grad.contiguous(), written_grad, grads,
        initial_grad, s.steps, s.chunks, s.heads, s.key, s.value, *dy.stride()[:3], HAS_FINAL=final_grad is not None,
        **options,
    )  # fmt: skip
    dq, dk = (torch.empty(s.batch, s.steps, s.heads, s.key, dtype=x.dtype, device=x.device) for x in (q, k))
    dv, dg, dbeta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, g, beta))
    k_grad, g_grad = s.empty(k, s.chunk, s.key), s.empty(k, s.chunk)
    launch(delta_reads_back_kernel, s.cells,
        q, k, g, seq, dy, c.start, c.end, c.written, c.states, grads, dq, k_grad, g_grad, *s.sizes(), s.scale, *strides,
        **s.per_cell(),
    )  # fmt: skip
    launch(delta_couplings_back_kernel, s.cells,
        k, v, g, beta, seq, c.start, c.solve, written_grad, c.states, k_grad, g_grad, dk, dv, dg, dbeta, *s.sizes(),
        *k.stride()[:3], *v.stride()[:3], *g.stride(), *beta.stride(), **s.per_cell(),
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, initial_grad


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *tensors, shape = given
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return run_forward(shape, _dense(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, final_grad: Any) -> tuple[Any, ...]:
        s, inputs = ctx.shape, _dense(*ctx.saved_tensors)
        q, _, v, *_, initial, _ = inputs
        dy = torch.zeros(v.shape, dtype=q.dtype, device=q.device) if dy is None else dense_rows(dy)
        dq, dk, *rest, initial_grad = run_backward(s, inputs, dy, final_grad)
        # Heads of q and k are read by several of v.
        dq, dk = (x.unflatten(2, (-1, s.per_key)).sum(3) for x in (dq, dk))
        return dq, dk, *rest, None if initial is None else initial_grad.to(initial.dtype), None, None


def _dense(q: Any, k: Any, v: Any, g: Any, beta: Any, initial: Any, seq: Any) -> Inputs:
    return dense_rows(q), dense_rows(k), dense_rows(v), g, beta, initial, seq
