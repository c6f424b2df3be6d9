"""The Mamba-1 selective scan over whole sequences, and one step of it for decoding."""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose, gradient_refusal
from ssmtune.ops.mamba1_selective_scan import reference, step
from ssmtune.ops.mamba1_selective_scan.reference import mamba1_recurrence

__all__ = ["mamba1_recurrence", "mamba1_selective_scan", "mamba1_state_update"]

MAX_STATE = 64
"""The largest state of a channel that the kernels hold in registers."""


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
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, D, T] in the dtype of `x_BDT` and the final state [B, D, N] in fp32 (fp64 for fp64 inputs).

    Everything between is fp32 (or fp64), differentiable once in all tensors, the initial state included.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state_BDN` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets dt = 0, so it neither decays nor feeds the state.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.mamba1_selective_scan
    if choose("mamba1_selective_scan", x_BDT, backend, _refusal(x_BDT, A_DN)).name == "triton":
        from ssmtune.ops.mamba1_selective_scan import triton

        run = triton.mamba1_selective_scan
    return run(
        x_BDT,
        dt_BDT,
        A_DN,
        B_BNT,
        C_BNT,
        D_D=D_D,
        z_BDT=z_BDT,
        dt_bias_D=dt_bias_D,
        dt_softplus=dt_softplus,
        initial_state_BDN=initial_state_BDN,
        seq_idx=seq_idx,
        padding_mask=padding_mask,
    )


def mamba1_state_update(
    state_BDN: torch.Tensor,
    x_BD: torch.Tensor,
    dt_BD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BN: torch.Tensor,
    C_BN: torch.Tensor,
    *,
    D_D: torch.Tensor | None = None,
    z_BD: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the output of one step, [B, D], in the dtype of `x_BD`, and write the new state into `state_BDN`.

    The arithmetic is fp32 (fp64 for fp64 inputs) and equals one step of `mamba1_selective_scan`.
    `backend`: `ops.backend` chooses; the kernel gives no gradients. Raises `ConfigError` when "triton" is asked for and
    cannot run.
    """
    run = step.mamba1_state_update
    given = (state_BDN, x_BD, dt_BD, A_DN, B_BN, C_BN, D_D, z_BD, dt_bias_D)
    refusal = _refusal(x_BD, A_DN) or gradient_refusal(*given)
    if choose("mamba1_state_update", x_BD, backend, refusal).name == "triton":
        from ssmtune.ops.mamba1_selective_scan import step_triton

        run = step_triton.mamba1_state_update
    return run(
        state_BDN, x_BD, dt_BD, A_DN, B_BN, C_BN, D_D=D_D, z_BD=z_BD, dt_bias_D=dt_bias_D, dt_softplus=dt_softplus
    )


def _refusal(x: torch.Tensor, A_DN: torch.Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(x.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if A_DN.shape[1] > MAX_STATE:
        return f"state size {A_DN.shape[1]} is over {MAX_STATE}"
    return None
