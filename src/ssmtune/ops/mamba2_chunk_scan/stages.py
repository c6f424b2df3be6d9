"""The stages of the Mamba-2 scan that its forward and its backward pass share, as launches of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton

from ssmtune.ops.launch import launch
from ssmtune.ops.mamba2_chunk_scan.backward_kernels import leaving_kernel
from ssmtune.ops.mamba2_chunk_scan.forward_kernels import entering_kernel, scores_kernel, steps_kernel
from ssmtune.ops.precision import multiplies_exactly

CHUNK = 64
"""Steps per chunk."""
WALK = {"BLOCK_P": 16, "BLOCK_N": 128, "STAGES": 4, "num_warps": 4}
"""Of the walks over chunks: at most so much of a head's state in one program, since heads alone do not fill a GPU."""
AHEAD_BYTES = 70_000
"""Shared memory of a program that loads the next two heads' blocks ahead, 64 wide; in fp32 they do not fit at all."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
"""Loops over the state run once or twice: there is nothing to pipeline, and shared memory to save."""


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of one call, as the kernels take them."""

    batch: int
    steps: int
    heads: int
    width: int
    groups: int
    state: int
    softplus: bool
    limit: tuple[float, float]
    exact: bool
    """Keep fp32 precision in products and states; else operands and the states between kernels are rounded to bf16."""

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.steps // CHUNK)

    def blocks(self) -> dict[str, Any]:
        """Block sizes of the products: at least 16, which tensor cores need."""
        return {"L": CHUNK, "BLOCK_P": self.block_p, "BLOCK_N": self.block_n, "EXACT": self.exact}

    @cached_property
    def block_p(self) -> int:
        """Rows of the state in one program: all of them."""
        return max(16, int(triton.next_power_of_2(self.width)))

    @cached_property
    def block_n(self) -> int:
        """Columns of the state in one program."""
        return min(32 if self.exact else 64, max(16, int(triton.next_power_of_2(self.state))))

    @property
    def blocks_n(self) -> int:
        """Programs along the state."""
        return -(-self.state // self.block_n)

    def over_heads(self, memory: int) -> dict[str, int]:
        """Launch options of the kernels that loop over a group's heads; `memory` is what a program may share, in bytes."""
        fits = not self.exact and memory >= (AHEAD_BYTES if self.block_p <= 64 else 2 * AHEAD_BYTES)
        return {"num_warps": 4, "num_stages": 3 if fits else 1}

    def walk(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Grid and options of the kernels that walk over chunks."""
        block_p, state = min(self.block_p, WALK["BLOCK_P"]), max(16, int(triton.next_power_of_2(self.state)))
        block_n = min(state, WALK["BLOCK_N"] // (4 if self.exact else 1))
        grid = -(-self.width // block_p), -(-self.state // block_n), self.batch * self.heads
        return grid, {**WALK, "BLOCK_P": block_p, "BLOCK_N": block_n, "L": CHUNK, "EXACT": self.exact}

    def steps_options(self, dt: torch.Tensor, bias: Any, mask: Any) -> dict[str, Any]:
        """Arguments of the two kernels of the step sizes, from `low` on."""
        low, high = self.limit
        return {
            "low": float(low),
            "high": float(high),
            "dt_b": dt.stride(0),
            "dt_t": dt.stride(1),
            "dt_h": dt.stride(2),
            "SOFTPLUS": self.softplus,
            "LIMITED": tuple(self.limit) != (0.0, math.inf),
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "L": CHUNK,
            "BLOCK_H": 16,
        }


def shape_of(x_BTHP: torch.Tensor, B_BTGN: torch.Tensor, softplus: bool, limit: tuple[float, float]) -> Shape:
    """The sizes and switches of a call with these inputs."""
    batch, num_steps, num_heads, width = x_BTHP.shape
    groups, state = B_BTGN.shape[2:]
    return _shape(batch, num_steps, num_heads, width, groups, state, softplus, limit, multiplies_exactly(x_BTHP))


_shape = lru_cache(maxsize=64)(Shape)


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def step_sizes(s: Shape, dt: Any, bias: Any, A: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`step` and `decay` [B, H, T']."""
    step = torch.empty(s.batch, s.heads, s.chunks * CHUNK, dtype=torch.float32, device=dt.device)
    decay = torch.empty_like(step)
    launch(
        steps_kernel,
        (s.chunks, -(-s.heads // 16), s.batch),
        dt,
        bias,
        A,
        mask,
        step,
        decay,
        s.steps,
        s.heads,
        **s.steps_options(dt, bias, mask),
        **LAUNCH,
    )
    return step, decay


def chunk_scores(s: Shape, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """C_l . B_s of every chunk, [B, c, G, L, L]."""
    scores = torch.empty(s.batch, s.chunks, s.groups, CHUNK, CHUNK, dtype=torch.float32, device=B.device)
    launch(scores_kernel, (s.chunks, s.batch * s.groups),
        C, B, scores, s.steps, s.groups, s.state, *C.stride()[:3], *B.stride()[:3], L=CHUNK, BLOCK_N=s.block_n,
        EXACT=s.exact, **LAUNCH,
    )  # fmt: skip
    return scores


def _states(s: Shape, like: torch.Tensor) -> torch.Tensor:
    """A state for each chunk, as they lie between kernels: [B, H, c, P, N]."""
    kept = torch.float32 if s.exact else torch.bfloat16
    return torch.empty(s.batch, s.heads, s.chunks, s.width, s.state, dtype=kept, device=like.device)


def _fp32_state(s: Shape, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(s.batch, s.heads, s.width, s.state, dtype=torch.float32, device=like.device)


def entering_states(
    s: Shape, x: Any, B: Any, step: Any, decay: Any, seq: Any, initial: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that enters each chunk, [B, H, c, P, N], and the final one."""
    states, final = _states(s, x), _fp32_state(s, x)
    grid, options = s.walk()
    launch(entering_kernel, grid,
        x, B, step, decay, seq, None if initial is None else initial.contiguous(), states, final, s.steps, s.chunks,
        s.heads, s.heads // s.groups, s.width, s.state, *x.stride()[:3], *B.stride()[:3],
        HAS_INITIAL=initial is not None, HAS_SEQ=seq is not None, **options,
    )  # fmt: skip
    return states, final


def leaving_gradients(
    s: Shape, dy: Any, C: Any, step: Any, decay: Any, seq: Any, final_grad: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients: of the state that leaves each chunk, [B, H, c, P, N], and of the first state."""
    grads, initial_grad = _states(s, dy), _fp32_state(s, dy)
    grid, options = s.walk()
    launch(leaving_kernel, grid,
        dy, C, step, decay, seq, None if final_grad is None else final_grad.contiguous(), grads, initial_grad, s.steps,
        s.chunks, s.heads, s.heads // s.groups, s.width, s.state, *dy.stride()[:3], *C.stride()[:3],
        HAS_FINAL=final_grad is not None, HAS_SEQ=seq is not None, **options,
    )  # fmt: skip
    return grads, initial_grad
