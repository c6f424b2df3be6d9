"""One step of the Mamba-2 recurrence, for decoding."""

from __future__ import annotations

import math

import torch

from ssmtune.ops.backend import Backend, choose, gradient_refusal
from ssmtune.ops.selective_state_update import reference

__all__ = ["selective_state_update"]

MAX_STATE = 1024
"""The largest state that the kernel reads in one row."""


def selective_state_update(
    state_BHPN: torch.Tensor,
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    B_BGN: torch.Tensor,
    C_BGN: torch.Tensor,
    *,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the output of one step, [B, H, P], in the dtype of `x_BHP`, and write the new state into `state_BHPN`.

    The arithmetic is fp32 (fp64 for fp64 inputs) and equals one step of `mamba2_chunk_scan`.
    `backend`: `ops.backend` chooses; the kernel gives no gradients. Raises `ConfigError` when "triton" is asked for and
    cannot run.
    """
    run = reference.selective_state_update
    given = (state_BHPN, x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H)
    refusal = _refusal(x_BHP, B_BGN) or gradient_refusal(*given)
    if choose("selective_state_update", x_BHP, backend, refusal).name == "triton":
        from ssmtune.ops.selective_state_update import triton

        run = triton.selective_state_update
    return run(
        state_BHPN,
        x_BHP,
        dt_BH,
        A_H,
        B_BGN,
        C_BGN,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


def _refusal(x_BHP: torch.Tensor, B_BGN: torch.Tensor) -> str | None:
    """Why the kernel cannot serve these inputs, or None."""
    if x_BHP.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(x_BHP.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if B_BGN.shape[-1] > MAX_STATE:
        return f"state size {B_BGN.shape[-1]} is over {MAX_STATE}"
    return None
