"""The stages of the Mamba-2 scan that its forward and its backward pass share, as launches of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton

from ssmtune.ops.launch import launch
from ssmtune.ops.mamba2_chunk_scan.backward_kernels import pass_back_kernel
from ssmtune.ops.mamba2_chunk_scan.forward_kernels import pass_kernel, scores_kernel, states_kernel, steps_kernel
from ssmtune.ops.precision import multiplies_exactly

CHUNK = 64
"""Steps per chunk."""
PASS_BLOCK, PASS_STAGES = 512, 3
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


def _chunk_sums(s: Shape, rows: Any, cols: Any, step: Any, decay: Any, seq: Any, at_end: bool) -> torch.Tensor:
    """Weighted sums of rows cols^T over each chunk, [B, H, c, P, N]."""
    kept = torch.float32 if s.exact else torch.bfloat16
    out = torch.empty(s.batch, s.heads, s.chunks, s.width, s.state, dtype=kept, device=rows.device)
    launch(states_kernel, (s.chunks, s.batch * s.heads, s.blocks_n),
        rows, cols, step, decay, seq, out, s.steps, s.heads, s.heads // s.groups, s.width, s.state,
        *rows.stride()[:3], *cols.stride()[:3], AT_END=at_end, HAS_SEQ=seq is not None, **s.blocks(), **LAUNCH,
    )  # fmt: skip
    return out


def _fp32_state(s: Shape, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(s.batch, s.heads, s.width, s.state, dtype=torch.float32, device=like.device)


def entering_states(
    s: Shape, x: Any, B: Any, step: Any, decay: Any, seq: Any, initial: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that enters each chunk, [B, H, c, P, N], and the final one."""
    states = _chunk_sums(s, x, B, step, decay, seq, True)
    final, size = _fp32_state(s, x), s.width * s.state
    launch(pass_kernel, (-(-size // PASS_BLOCK), s.batch * s.heads),
        states, None if initial is None else initial.contiguous(), final, decay, seq, s.steps, s.chunks, s.heads, size,
        HAS_INITIAL=initial is not None, HAS_SEQ=seq is not None, L=CHUNK, BLOCK=PASS_BLOCK, STAGES=PASS_STAGES, num_warps=4,
    )  # fmt: skip
    return states, final


def leaving_gradients(
    s: Shape, dy: Any, C: Any, states: torch.Tensor, step: Any, decay: Any, seq: Any, final_grad: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients: of the state that leaves each chunk, of the log decay of what passes [B, H, blocks, c], of the first state."""
    grads = _chunk_sums(s, dy, C, step, decay, seq, False)
    initial_grad, size = _fp32_state(s, dy), s.width * s.state
    blocks = -(-size // PASS_BLOCK)
    through = torch.empty(s.batch, s.heads, blocks, s.chunks, dtype=torch.float32, device=dy.device)
    launch(pass_back_kernel, (blocks, s.batch * s.heads),
        grads, states, None if final_grad is None else final_grad.contiguous(), initial_grad, through, decay, seq,
        s.steps, s.chunks, s.heads, size, HAS_FINAL=final_grad is not None, HAS_SEQ=seq is not None, L=CHUNK,
        BLOCK=PASS_BLOCK, STAGES=PASS_STAGES, num_warps=4,
    )  # fmt: skip
    return grads, through, initial_grad
