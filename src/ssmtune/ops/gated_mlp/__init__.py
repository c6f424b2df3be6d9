"""A gated MLP whose two halves are one projection, both projections adapted, with the norm before and the residual after.

y = x + multiplier * out(silu(g) * u) where (g, u) = in(norm(x)), in and out each a frozen weight plus a low-rank term.
The kernels add the low-rank terms of what is 2 K wide while they activate it: no pass over memory is spent on them.
"""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.gated_mlp import reference
from ssmtune.ops.projection.spec import LowRank, Normed, Weight

__all__ = ["gated_mlp"]


def gated_mlp(
    x: torch.Tensor,
    norm: Normed,
    in_weight_2KD: Weight,
    out_weight_DK: Weight,
    in_low_rank: LowRank | None = None,
    out_low_rank: LowRank | None = None,
    *,
    multiplier: float = 1.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [..., D] in the dtype of `x` [..., D].

    The weights are frozen: they get no gradient. Differentiable in `x` and in the factors.
    `backend`: `ops.backend` chooses; the kernels serve both projections adapted, at most rank 64, without dropout.
    Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.gated_mlp
    problem = _refusal(x, norm, in_weight_2KD, out_weight_DK, in_low_rank, out_low_rank)
    # Not a fallback to plain PyTorch: the reference is made of projections, which choose for themselves.
    chosen = "reference" if problem is not None and backend == "auto" else choose("gated_mlp", x, backend, problem).name
    if chosen == "triton":
        from ssmtune.ops.gated_mlp import triton

        run = triton.gated_mlp
    return run(x, norm, in_weight_2KD, out_weight_DK, in_low_rank, out_low_rank, multiplier)


MAX_RANK = 64
"""What the kernels hold of the factors beside a block of the activations."""


def _refusal(
    x: torch.Tensor,
    norm: Normed,
    in_weight: Weight,
    out_weight: Weight,
    in_low_rank: LowRank | None,
    out_low_rank: LowRank | None,
) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16) or in_weight.dtype != x.dtype or out_weight.dtype != x.dtype:
        return f"inputs and weights are {x.dtype}, {in_weight.dtype} and {out_weight.dtype}"
    if in_weight.requires_grad or out_weight.requires_grad or norm.weight_D.requires_grad:
        return "a weight trains"
    if in_low_rank is None or out_low_rank is None:
        return "one of the projections has no low-rank term"
    if in_low_rank.dropout or out_low_rank.dropout:
        return "there is dropout"
    if max(in_low_rank.A.shape[0], out_low_rank.A.shape[0]) > MAX_RANK:
        return f"a rank is over {MAX_RANK}"
    return None
