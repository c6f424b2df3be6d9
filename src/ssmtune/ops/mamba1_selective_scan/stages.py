"""What the Mamba-1 scan's forward and its backward pass share: its inputs as the kernels read them, and the states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ssmtune.ops.mamba1_selective_scan.forward_kernels import chunk_kernel, pass_kernel

PASS_STAGES = 3


@dataclass(frozen=True)
class Inputs:
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

    def fp32(self, *dims: int) -> torch.Tensor:
        """An empty fp32 tensor beside the inputs."""
        return torch.empty(dims, dtype=torch.float32, device=self.x.device)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, steps, channels, state."""
        batch, steps, channels = self.x.shape
        return batch, steps, channels, self.A.shape[1]

    def blocks(self, elements: int) -> dict[str, Any]:
        """Block sizes of a tile of the state with about so many elements, for one warp."""
        block_n = int(triton.next_power_of_2(self.A.shape[1]))
        return {"BLOCK_D": min(128, max(8, elements // block_n)), "BLOCK_N": block_n, "num_warps": 1}

    @property
    def switches(self) -> dict[str, Any]:
        """What every kernel that walks over steps is told."""
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


def in_rows(
    x: Any, dt: Any, A: Any, B: Any, C: Any, skip: Any, z: Any, bias: Any, flags: Any, softplus: bool
) -> Inputs:
    """The inputs [B, ..., T] in rows; those that are not contiguous along channels are copied."""
    return Inputs(
        x=dense_rows(x),
        dt=dense_rows(dt),
        A=A,
        B=dense_rows(B),
        C=dense_rows(C),
        skip=None if skip is None else skip.contiguous(),
        z=None if z is None else dense_rows(z),
        bias=None if bias is None else bias.contiguous(),
        flags=flags,
        softplus=softplus,
    )


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """[B, ..., T] as [B, T, ...]: a view, or a copy where the last dimension would not be contiguous."""
    rows = t.transpose(1, 2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def strides(t: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of batch and time of what may be absent."""
    return (0, 0) if t is None else t.stride()[:2]
