"""Mamba-1 scan on NVIDIA GPUs, in Triton: chunks of time side by side, states passed between them, no tensor of all states.

Only the inputs are kept for the backward pass; states are computed again.
Memory for a pass: a state per chunk in fp32 forward, two per chunk of `CHUNK_BACK` steps backward; B's and C's gradients
are summed over at most `MAX_SHARES` shares of the channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.mamba1_selective_scan.backward_kernels import chunk_back_kernel, inputs_kernel, pass_back_kernel
from ssmtune.ops.mamba1_selective_scan.forward_kernels import chunk_kernel, output_kernel, pass_kernel

CHUNK, CHUNK_BACK = 64, 32
"""Steps per chunk forward and backward."""
KEPT = 8
"""Steps of a chunk whose states the backward pass holds in registers at the same time."""
MAX_SHARES = 32
PASS_STAGES = 3


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


@dataclass(frozen=True)
class _Inputs:
    """What the kernels read, in rows [B, T, ...], and what they are told of it."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    skip: torch.Tensor | None
    z: torch.Tensor | None
    bias: torch.Tensor | None
    flags: torch.Tensor | None
    softplus: bool

    @classmethod
    def of(
        cls, x: Any, dt: Any, A: Any, B: Any, C: Any, skip: Any, z: Any, bias: Any, flags: Any, softplus: bool
    ) -> Any:
        """The inputs [B, ..., T] in rows; those that are not contiguous along channels are copied."""
        rows = [None if t is None else _dense_rows(t.transpose(1, 2)) for t in (x, dt, B, C, z)]
        skip, bias = (None if t is None else t.contiguous() for t in (skip, bias))
        return cls(rows[0], rows[1], A, rows[2], rows[3], skip, rows[4], bias, flags, softplus)

    def fp32(self, *dims: int) -> torch.Tensor:
        """An empty fp32 tensor beside the inputs."""
        return torch.empty(dims, dtype=torch.float32, device=self.x.device)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, steps, channels, state."""
        return (*self.x.shape, self.A.shape[1])

    def blocks(self, elements: int) -> dict[str, Any]:
        """Block sizes of a tile of the state with about so many elements, for one warp."""
        block_n = int(triton.next_power_of_2(self.A.shape[1]))
        return {"BLOCK_D": min(128, max(8, elements // block_n)), "BLOCK_N": block_n, "num_warps": 1}

    @property
    def switches(self) -> dict[str, Any]:
        return {"SOFTPLUS": self.softplus, "HAS_BIAS": self.bias is not None, "HAS_FLAGS": self.flags is not None}

    def states(self, initial: Any, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The state that enters each chunk of `length` steps [B, c, N, D], its steps' sum [B, c, D], the final state."""
        batch, steps, channels, size = self.sizes
        chunks = -(-steps // length)
        states, sums = self.fp32(batch, chunks, size, channels), self.fp32(batch, chunks, channels)
        final, blocks = self.fp32(batch, size, channels), self.blocks(1024)
        programs = -(-channels // blocks["BLOCK_D"])
        chunk_kernel[(programs, chunks, batch)](
            self.x, self.dt, self.bias, self.A, self.B, self.flags, states, sums, steps, channels, size,
            *self.x.stride()[:2], *self.dt.stride()[:2], *self.B.stride()[:2], *self.A.stride(), L=length,
            **self.switches, **blocks,
        )  # fmt: skip
        blocks = self.blocks(512)
        pass_kernel[(-(-channels // blocks["BLOCK_D"]), batch)](
            states, sums, self.A, initial, final, self.flags, steps, chunks, channels, size, *self.A.stride(),
            *((0, 0, 0) if initial is None else initial.stride()), HAS_INITIAL=initial is not None,
            HAS_FLAGS=self.flags is not None, L=length, STAGES=PASS_STAGES, **blocks,
        )  # fmt: skip
        return states, sums, final


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(t: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if t is None else t.stride()[:2]


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
        i = _Inputs.of(x, dt, A, B, C, D, z, bias, flags, softplus)
        batch, steps, channels, size = i.sizes
        states, _, final = i.states(initial, CHUNK)
        y = torch.empty(i.x.shape, dtype=x.dtype, device=x.device)
        blocks = i.blocks(1024)
        output_kernel[(-(-channels // blocks["BLOCK_D"]), states.shape[1], batch)](
            i.x, i.dt, i.bias, A, i.B, i.C, i.skip, i.z, flags, states, y, steps, channels, size, *i.x.stride()[:2],
            *i.dt.stride()[:2], *i.B.stride()[:2], *i.C.stride()[:2], *_strides(i.z), *A.stride(),
            HAS_SKIP=D is not None, HAS_Z=z is not None, L=CHUNK, **i.switches, **blocks,
        )  # fmt: skip
        return y.transpose(1, 2), final.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Any, final_grad: Any) -> tuple[Any, ...]:
        x, dt, A, B, C, D, z, bias, initial, flags = ctx.saved_tensors
        i = _Inputs.of(x, dt, A, B, C, D, z, bias, flags, ctx.softplus)
        batch, steps, channels, size = i.sizes
        dy = torch.zeros_like(i.x) if dy is None else _dense_rows(dy.transpose(1, 2))
        final_grad = None if final_grad is None else final_grad.transpose(1, 2).contiguous()
        states, sums, _ = i.states(initial, CHUNK_BACK)
        chunks, gated, blocks = states.shape[1], z is not None, i.blocks(1024)
        grads, initial_grad = torch.empty_like(states), i.fp32(batch, size, channels)
        chunk_back_kernel[(-(-channels // blocks["BLOCK_D"]), chunks, batch)](
            i.dt, i.bias, A, i.C, i.z, dy, flags, grads, steps, channels, size, *i.dt.stride()[:2],
            *i.C.stride()[:2], *_strides(i.z), *dy.stride()[:2], *A.stride(), HAS_Z=gated, L=CHUNK_BACK,
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
        dx, ddt, dz = (
            None if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (i.x, i.dt, i.z)
        )
        dB, dC = i.fp32(shares, batch, steps, size), i.fp32(shares, batch, steps, size)
        dD, dbias = i.fp32(batch, chunks, channels), i.fp32(batch, chunks, channels)
        inputs_kernel[(shares, chunks, batch)](
            i.x, i.dt, i.bias, A, i.B, i.C, i.skip, i.z, dy, flags, states, grads, dx, ddt, dz, dB, dC, dD, dbias,
            steps, each, channels, size, *i.x.stride()[:2], *i.dt.stride()[:2], *i.B.stride()[:2],
            *i.C.stride()[:2], *_strides(i.z), *dy.stride()[:2], *A.stride(), HAS_SKIP=D is not None, HAS_Z=gated,
            L=CHUNK_BACK, K=KEPT, **i.switches, **blocks,
        )  # fmt: skip
        return (
            dx.transpose(1, 2), ddt.transpose(1, 2), grads.sum((0, 1)).t().to(A.dtype),
            dB.sum(0).transpose(1, 2).to(B.dtype), dC.sum(0).transpose(1, 2).to(C.dtype),
            None if D is None else dD.sum((0, 1)).to(D.dtype),
            None if z is None else dz.transpose(1, 2),
            None if bias is None else dbias.sum((0, 1)).to(bias.dtype),
            None if initial is None else initial_grad.transpose(1, 2).to(initial.dtype),
            None, None,
        )  # fmt: skip
