"""The gated delta rule (Gated DeltaNet, and KDA with a decay per key channel) over whole sequences and single steps."""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.gated_delta_rule import reference
from ssmtune.ops.gated_delta_rule.reference import gated_delta_rule_recurrence
from ssmtune.ops.gated_delta_rule.step import gated_delta_rule_update

__all__ = ["gated_delta_rule", "gated_delta_rule_recurrence", "gated_delta_rule_update"]

MAX_WIDTH = 128
"""The widest key or value that the kernels hold in one block."""
TRIED_ON = 9
"""Major compute capability of the GPUs on which the kernels have been compared with the recurrence: Hopper's."""


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
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, H, V] in the dtype of `q_BTHK` and the final state [B, H, K, V] in fp32 (fp64 for fp64 inputs).

    `g` is the log decay, at most 0: [B, T, H], or [B, T, H, K] for a decay per key channel. `beta_BTH` may exceed 1.
    q and k may have fewer heads than v: each serves H / heads consecutive value heads. `scale` is K**-0.5 by default;
    `qk_l2norm` divides q and k by their lengths first. States and sums are fp32 (or fp64); differentiable in all tensors.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state_BHKV` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets g = 0 and beta = 0, so it leaves the state alone.
    `backend`: `ops.backend` chooses; kernels serve a decay per head.
    Raises `ConfigError` when the heads of q do not divide those of v, or "triton" is asked for and cannot run.
    """
    run = reference.gated_delta_rule
    if choose("gated_delta_rule", q_BTHK, backend, _refusal(q_BTHK, v_BTHV, g)).name == "triton":
        from ssmtune.ops.gated_delta_rule import triton

        run = triton.gated_delta_rule
    return run(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        g,
        beta_BTH,
        scale=scale,
        qk_l2norm=qk_l2norm,
        initial_state_BHKV=initial_state_BHKV,
        seq_idx=seq_idx,
        padding_mask=padding_mask,
    )


def _refusal(q: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(q.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != TRIED_ON:
        return "the kernels have been tried on Hopper GPUs only"
    if g.dim() == 4:
        return "the decay differs by key channel; the kernels take one per head"
    if v.shape[2] % q.shape[2]:
        return "the heads of q do not divide those of v"
    if max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        return f"keys are {q.shape[-1]} and values {v.shape[-1]} wide; the kernels take at most {MAX_WIDTH}"
    return None
