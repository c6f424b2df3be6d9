"""Root-mean-square normalisation, optionally of a gated input, as it stands after a recurrent layer's scan."""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.gated_rms_norm import reference

__all__ = ["gated_rms_norm"]

MAX_GROUP = 16384


def gated_rms_norm(
    x: torch.Tensor,
    weight_D: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return weight * norm(x * silu(gate)) in the dtype of `x` [..., D]; `gate` [..., D]; differentiable in all three.

    norm divides each group of `group_size` neighbours (D by default) by the root of its mean square plus `eps`.
    The arithmetic is fp32 (fp64 for fp64 inputs) and the result is rounded once.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    size = x.shape[-1] if group_size is None else group_size
    refusal = None
    if x.dtype not in (torch.float32, torch.bfloat16):
        refusal = f"inputs are {str(x.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    elif size > MAX_GROUP:
        refusal = f"a group of {size} is over {MAX_GROUP}"
    if choose("gated_rms_norm", x, backend, refusal).name == "triton":
        from ssmtune.ops.gated_rms_norm import triton

        return triton.gated_rms_norm(x, weight_D, gate, eps=eps, group_size=size)
    return reference.gated_rms_norm(x, weight_D, gate, eps=eps, group_size=size)
