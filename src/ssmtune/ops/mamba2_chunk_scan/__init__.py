"""The Mamba-2 state-space scan (SSD) over whole sequences."""

from __future__ import annotations

import math

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.mamba2_chunk_scan import reference
from ssmtune.ops.mamba2_chunk_scan.reference import mamba2_recurrence

__all__ = ["mamba2_chunk_scan", "mamba2_recurrence", "refusal"]

MAX_WIDTH, MAX_STATE = 128, 256
"""The largest head and state that the kernels hold in one block."""


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
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, H, P] in the dtype of `x_BTHP` and the final state [B, H, P, N] in fp32 (fp64 for fp64 inputs).

    States and sums are fp32 (or fp64), differentiable in all tensors, the initial state included.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_states_BHPN` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets dt = 0, so it neither decays nor feeds the state.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.mamba2_chunk_scan
    problem = refusal(x_BTHP.dtype, x_BTHP.shape[-1], B_BTGN.shape[-1])
    if choose("mamba2_chunk_scan", x_BTHP, backend, problem).name == "triton":
        from ssmtune.ops.mamba2_chunk_scan import triton

        run = triton.mamba2_chunk_scan
    return run(
        x_BTHP,
        dt_BTH,
        A_H,
        B_BTGN,
        C_BTGN,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        initial_states_BHPN=initial_states_BHPN,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        padding_mask=padding_mask,
    )


def refusal(dtype: torch.dtype, width: int, state: int) -> str | None:
    """Return why the kernels cannot serve inputs of this kind, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if width > MAX_WIDTH:
        return f"head width {width} is over {MAX_WIDTH}"
    if state > MAX_STATE:
        return f"state size {state} is over {MAX_STATE}"
    return None
