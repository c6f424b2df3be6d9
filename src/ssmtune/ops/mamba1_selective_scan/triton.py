"""Mamba-1 scan on NVIDIA GPUs, in Triton: chunks of time side by side, states passed between them, no tensor of all states.

Only the inputs are kept for the backward pass; states are computed again.
Memory for a pass: a state per chunk in fp32 forward, two per chunk of `CHUNK_BACK` steps backward; B's and C's gradients
are summed over at most `MAX_SHARES` shares of the channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ssmtune.ops.mamba1_selective_scan.backward_kernels import chunk_back_kernel, inputs_kernel, pass_back_kernel
from ssmtune.ops.mamba1_selective_scan.forward_kernels import output_kernel
from ssmtune.ops.mamba1_selective_scan.stages import PASS_STAGES, dense_rows, in_rows, strides

CHUNK, CHUNK_BACK = 64, 32
"""Steps per chunk forward and backward."""
KEPT = 4
"""Steps of a chunk whose states the backward pass holds in registers at the same time."""
MAX_SHARES = 32


def mamba1_selective_scan(
    x_BDT: torch.Tensor,
    dt_BDT: torch.Tensor,
    A_DN: torch.Tensor,
    B_BNT: torch.Tensor,
    C_BNT: torch.Tensor,
    *,
    D_D: torch.Tensor | None = None,
    z_BDT: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state_BDN: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    flags = _flags(seq_idx, padding_mask)
    found: tuple[torch.Tensor, torch.Tensor] = _Scan.apply(  # type: ignore[no-untyped-call]
        x_BDT, dt_BDT, A_DN, B_BNT, C_BNT, D_D, z_BDT, dt_bias_D, initial_state_BDN, flags, dt_softplus
    )
    return found


def _flags(seq_idx: torch.Tensor | None, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[B, T]: 1 where a step counts, plus 2 where a document begins; None where all count and none begins."""
    if seq_idx is None:
        return None if padding_mask is None else (padding_mask != 0).to(torch.int8).contiguous()
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).to(torch.int8)
    return begins * 2 + (1 if padding_mask is None else (padding_mask != 0).to(torch.int8))


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
        z: Any,
        bias: Any,
        initial: Any,
        flags: Any,
        softplus: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, D, z, bias, initial, flags)
        ctx.softplus = softplus
        ctx.set_materialize_grads(False)
        i = in_rows(x, dt, A, B, C, D, z, bias, flags, softplus)
        batch, steps, channels, size = i.sizes
        states, _, final = i.states(initial, CHUNK)
        y = torch.empty(i.x.shape, dtype=x.dtype, device=x.device)
        blocks = i.blocks(1024)
        output_kernel[(-(-channels // blocks["BLOCK_D"]), states.shape[1], batch)](
            i.x, i.dt, i.bias, A, i.B, i.C, i.skip, i.z, flags, states, y, steps, channels, size, *i.x.stride()[:2],
            *i.dt.stride()[:2], *i.B.stride()[:2], *i.C.stride()[:2], *strides(i.z), *A.stride(),
            HAS_SKIP=D is not None, HAS_Z=z is not None, L=CHUNK, **i.switches, **blocks,
        )  # fmt: skip
        return y.transpose(1, 2), final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, final_grad: Any) -> tuple[Any, ...]:
        x, dt, A, B, C, D, z, bias, initial, flags = ctx.saved_tensors
        i = in_rows(x, dt, A, B, C, D, z, bias, flags, ctx.softplus)
        batch, steps, channels, size = i.sizes
        dy = torch.zeros_like(i.x) if dy is None else dense_rows(dy)
        final_grad = None if final_grad is None else final_grad.transpose(1, 2).contiguous()
        states, sums, _ = i.states(initial, CHUNK_BACK)
        chunks, gated, blocks = states.shape[1], z is not None, i.blocks(1024)
        grads, initial_grad = torch.empty_like(states), i.fp32(batch, size, channels)
        chunk_back_kernel[(-(-channels // blocks["BLOCK_D"]), chunks, batch)](
            i.dt, i.bias, A, i.C, i.z, dy, flags, grads, steps, channels, size, *i.dt.stride()[:2],
            *i.C.stride()[:2], *strides(i.z), *dy.stride()[:2], *A.stride(), HAS_Z=gated, L=CHUNK_BACK,
            **i.switches, **blocks,
        )  # fmt: skip
        blocks = i.blocks(512)
        num_blocks = -(-channels // blocks["BLOCK_D"])
        pass_back_kernel[(num_blocks, batch)](
            grads, sums, A, final_grad, initial_grad, flags, steps, chunks, channels, size, *A.stride(),
            HAS_FINAL=final_grad is not None, HAS_FLAGS=flags is not None, L=CHUNK_BACK, STAGES=PASS_STAGES, **blocks,
        )  # fmt: skip
        each = -(-num_blocks // MAX_SHARES)
        shares = -(-num_blocks // each)
        dx, ddt = (
            torch.empty(i.x.shape, dtype=x.dtype, device=x.device),
            torch.empty(i.dt.shape, dtype=dt.dtype, device=x.device),
        )
        dz = None if i.z is None else torch.empty(i.z.shape, dtype=z.dtype, device=x.device)
        dB, dC = i.fp32(shares, batch, steps, size), i.fp32(shares, batch, steps, size)
        dD, dbias = i.fp32(batch, chunks, channels), i.fp32(batch, chunks, channels)
        inputs_kernel[(shares, chunks, batch)](
            i.x, i.dt, i.bias, A, i.B, i.C, i.skip, i.z, dy, flags, states, grads, dx, ddt, dz, dB, dC, dD, dbias,
            steps, each, channels, size, *i.x.stride()[:2], *i.dt.stride()[:2], *i.B.stride()[:2],
            *i.C.stride()[:2], *strides(i.z), *dy.stride()[:2], *A.stride(), HAS_SKIP=D is not None, HAS_Z=gated,
            L=CHUNK_BACK, K=KEPT, **i.switches, **blocks,
        )  # fmt: skip
        return (
            dx.transpose(1, 2), ddt.transpose(1, 2), grads.sum((0, 1)).t().to(A.dtype),
            dB.sum(0).transpose(1, 2).to(B.dtype), dC.sum(0).transpose(1, 2).to(C.dtype),
            None if D is None else dD.sum((0, 1)).to(D.dtype),
            None if dz is None else dz.transpose(1, 2),
            None if bias is None else dbias.sum((0, 1)).to(bias.dtype),
            None if initial is None else initial_grad.transpose(1, 2).to(initial.dtype),
            None, None,
        )  # fmt: skip
