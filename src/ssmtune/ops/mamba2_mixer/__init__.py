"""A whole Mamba-2 mixer with the norm before it and the residual after it, both projections adapted.

y = x + multiplier * out(gated_norm(scan(conv(xBC), dt), z)) where (z, xBC, dt) = in(norm(x)).
In one operation, since then every gradient is written where the next product reads it: those of z, xBC and dt side by
side, the residual's into the norm's.
"""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.mamba2_chunk_scan import refusal as scan_refusal
from ssmtune.ops.mamba2_mixer import reference
from ssmtune.ops.mamba2_mixer.spec import Adapted, Core

__all__ = ["Adapted", "Core", "mamba2_mixer"]


def mamba2_mixer(
    x_BTD: torch.Tensor,
    inner: Adapted,
    core: Core,
    outer: Adapted,
    *,
    residual: bool = True,
    multiplier: float = 1.0,
    seq_idx: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [B, T, D] in the dtype of `x_BTD`; without `residual`, what would be added to x.

    The gate of `outer.norm` is z, whatever it says itself. Weights, biases and norms are frozen: they get no gradient.
    Differentiable in `x_BTD`, in the low-rank factors, and in A, D and dt_bias of `core`. States start from zero in every
    document of `seq_idx` [B, T].
    `backend`: `ops.backend` chooses; the kernels serve both projections adapted, without biases or dropout, and a frozen
    convolution. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.mamba2_mixer
    problem = _refusal(x_BTD, inner, core, outer)
    # Not a fallback to plain PyTorch: the reference is made of operations, which choose for themselves.
    unserved = problem is not None and backend == "auto"
    if not unserved and choose("mamba2_mixer", x_BTD, backend, problem).name == "triton":
        from ssmtune.ops.mamba2_mixer import triton

        run = triton.mamba2_mixer
    return run(x_BTD, inner, core, outer, residual=residual, multiplier=multiplier, seq_idx=seq_idx)


def _refusal(x: torch.Tensor, inner: Adapted, core: Core, outer: Adapted) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    heads, width = core.A_H.shape[0], outer.weight_OI.shape[1]
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(x.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    for part in (inner, outer):
        if part.weight_OI.dtype != x.dtype:
            return f"a weight is {part.weight_OI.dtype}, the input {x.dtype}"
        if part.bias_O is not None:
            return "a projection has a bias"
        if part.low_rank is None or part.low_rank.dropout:
            return "a projection has no low-rank term, or dropout before it"
    frozen = (inner.weight_OI, outer.weight_OI, inner.norm.weight_D, outer.norm.weight_D, core.conv_weight_CK)
    if any(tensor.requires_grad for tensor in frozen) or (
        core.conv_bias_C is not None and core.conv_bias_C.requires_grad
    ):
        return "a weight trains"
    return scan_refusal(x.dtype, width // heads, core.state)
