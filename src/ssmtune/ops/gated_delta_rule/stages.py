"""The stages of the gated delta rule that its forward and its backward pass share, as launches of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ssmtune.ops.gated_delta_rule.forward_kernels import delta_couplings_kernel, delta_entering_kernel
from ssmtune.ops.gated_delta_rule.reference import NORM_EPS
from ssmtune.ops.launch import launch

CHUNK, CHUNK_EXACT = 64, 32
"""Steps per chunk; blocks of fp32 take twice the memory."""
SUBS = 4
"""Parts of a chunk whose couplings are solved by substitution, side by side."""
WALK_V, CELL_V = 32, 64
"""Values in one program of the kernels that walk over chunks, and of those that work on one; half as many in fp32."""
WALK = {"num_warps": 4, "STAGES": 3}
"""Chunks are loaded three ahead. Not to be changed untried: on an H200 with Triton 3.6 two are slower, and with one a walk
ended in an illegal memory access (`ops.backend.KNOWN_BAD`), though no access of the source leaves its tensor."""
CELL = {"num_warps": 8, "num_stages": 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and switches of one call."""

    batch: int
    steps: int
    heads: int
    """Value heads."""
    per_key: int
    """Value heads that read one head of q and k."""
    key: int
    value: int
    scale: float
    norm: bool
    has_seq: bool
    exact: bool
    """Keep fp32 precision in products and states; else operands and what lies between kernels are rounded to bf16."""

    @property
    def chunk(self) -> int:
        """Steps per chunk."""
        return CHUNK_EXACT if self.exact else CHUNK

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.steps // self.chunk)

    @property
    def cells(self) -> tuple[int, int]:
        """Grid of the kernels that work on one chunk of a head."""
        return self.chunks, self.batch * self.heads

    @property
    def block_k(self) -> int:
        """Keys in one program: all of them."""
        return max(16, int(triton.next_power_of_2(self.key)))

    def block_v(self, most: int) -> int:
        """Values in one program."""
        return min(most // 2 if self.exact else most, max(16, int(triton.next_power_of_2(self.value))))

    def per_cell(self) -> dict[str, Any]:
        """Options of the kernels that work on one chunk of a head."""
        return {"HAS_SEQ": self.has_seq, "NORM": self.norm, "EPS": NORM_EPS, "L": self.chunk, "BLOCK_K": self.block_k,
                "BLOCK_V": self.block_v(CELL_V), "EXACT": self.exact, **CELL}  # fmt: skip

    def walk(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """Grid and options of the kernels that walk over chunks: heads alone do not fill a GPU."""
        block = self.block_v(WALK_V)
        options = {"L": self.chunk, "BLOCK_K": self.block_k, "BLOCK_V": block, "EXACT": self.exact, **WALK}
        return (-(-self.value // block), self.batch * self.heads), options

    def sizes(self) -> tuple[int, ...]:
        """What kernels that work on one chunk take."""
        return self.steps, self.heads, self.per_key, self.key, self.value

    def empty(self, like: torch.Tensor, *dims: int, narrow: bool = False) -> torch.Tensor:
        """[B, H, c, *dims], fp32 unless it is `narrow` and products are rounded anyway."""
        dtype = torch.bfloat16 if narrow and not self.exact else torch.float32
        return torch.empty(self.batch, self.heads, self.chunks, *dims, dtype=dtype, device=like.device)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any, Any]
"""q, k and v with a contiguous last dimension, g and beta in fp32, the initial state and the documents or None."""


@dataclass(frozen=True)
class Chunks:
    """What chunks do to states, and the states that enter them; names as in `forward_kernels`."""

    solve: torch.Tensor
    w: torch.Tensor
    k_end: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    written: torch.Tensor
    states: torch.Tensor
    final: torch.Tensor


def through_chunks(s: Shape, inputs: Inputs) -> Chunks:
    """Walk through the sequence."""
    _, k, v, g, beta, initial, seq = inputs
    solve, w, k_end, written, states = (
        s.empty(k, *dims, narrow=True)
        for dims in ((s.chunk, s.chunk), (s.chunk, s.key), (s.chunk, s.key), (s.chunk, s.value), (s.key, s.value))
    )
    start, end = s.empty(k, s.chunk), s.empty(k, s.chunk)
    launch(delta_couplings_kernel, s.cells,
        k, v, g, beta, seq, solve, w, written, k_end, start, end, *s.sizes(), *k.stride()[:3], *v.stride()[:3],
        *g.stride(), *beta.stride(), SUB=s.chunk // SUBS, **s.per_cell(),
    )  # fmt: skip
    final = torch.empty(s.batch, s.heads, s.key, s.value, dtype=torch.float32, device=k.device)
    grid, options = s.walk()
    launch(delta_entering_kernel, grid,
        w, k_end, start, None if initial is None else initial.contiguous(), written, states, final, s.chunks, s.key,
        s.value, HAS_INITIAL=initial is not None, **options,
    )  # fmt: skip
    return Chunks(solve, w, k_end, start, end, written, states, final)
