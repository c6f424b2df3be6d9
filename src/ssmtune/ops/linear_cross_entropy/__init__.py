"""Next-token loss of a frozen output head, without ever holding the logits of all tokens."""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.linear_cross_entropy import reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Return the summed cross entropy, fp32 (fp64 for fp64), of logits hidden W^T against `targets_N`, which are in [0, V).

    `weight_VD` is frozen: it gets no gradient. Differentiable in `hidden_ND`.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.linear_cross_entropy
    if choose("linear_cross_entropy", hidden_ND, backend, _refusal(hidden_ND, weight_VD)).name == "triton":
        from ssmtune.ops.linear_cross_entropy import triton

        run = triton.linear_cross_entropy
    return run(hidden_ND, weight_VD, targets_N)


def _refusal(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if hidden_ND.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(hidden_ND.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if weight_VD.dtype != hidden_ND.dtype:
        return f"the weight is {weight_VD.dtype}, the input {hidden_ND.dtype}"
    if weight_VD.requires_grad:
        return "the head trains"
    return None
