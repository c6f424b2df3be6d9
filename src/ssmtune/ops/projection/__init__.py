"""A frozen projection with its low-rank adapter, what comes before it and the residual after it, as one operation.

y = residual + multiplier * (p W^T + bias + scale * (p A^T) B^T) where p = prologue(x).
The kernels keep x and p A^T for the backward pass and compute p again: nothing that a norm or an activation writes is
ever held.
"""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.precision import outside_autocast
from ssmtune.ops.projection import reference
from ssmtune.ops.projection.spec import Activated, LowRank, Normed, Packed, Prologue, Weight

__all__ = ["Activated", "LowRank", "Normed", "Packed", "projection"]


@outside_autocast
def projection(
    x: torch.Tensor,
    weight_OI: Weight,
    bias_O: torch.Tensor | None = None,
    *,
    low_rank: LowRank | None = None,
    prologue: Prologue | None = None,
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [..., O] in the dtype of `x`, which is [..., I], or [..., 2 I] where the prologue takes two halves.

    `weight_OI` and `bias_O` are frozen: they get no gradient, and a `Packed` weight is unpacked for each product.
    Differentiable in `x`, in the tensors of `low_rank` and `prologue` (but a norm's weight), and in `residual`.
    Products are in the dtype of `x`, to which the low-rank factors are rounded, as under autocast.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.projection
    if choose("projection", x, backend, _refusal(x, weight_OI, prologue)).name == "triton":
        from ssmtune.ops.projection import triton

        run = triton.projection
    return run(x, weight_OI, bias_O, low_rank=low_rank, prologue=prologue, residual=residual, multiplier=multiplier)


def _refusal(x: torch.Tensor, weight_OI: Weight, prologue: Prologue | None) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(x.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if weight_OI.dtype != x.dtype:
        return f"the weight is {weight_OI.dtype}, the input {x.dtype}"
    if weight_OI.requires_grad or (isinstance(prologue, Normed) and prologue.weight_D.requires_grad):
        return "the weight or the norm's weight trains"
    return None
