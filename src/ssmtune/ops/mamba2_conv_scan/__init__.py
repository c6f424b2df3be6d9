"""Convolution and Mamba-2 scan in one: what the convolution writes is computed again in the backward pass, not held."""

from __future__ import annotations

import math

import torch

from ssmtune.ops.backend import Backend, choose
from ssmtune.ops.mamba2_chunk_scan import refusal
from ssmtune.ops.mamba2_conv_scan import reference

__all__ = ["mamba2_conv_scan"]


def mamba2_conv_scan(
    xBC_BTC: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor | None,
    *,
    groups: int,
    state: int,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return y [B, T, H P] in the dtype of `xBC_BTC`, whose channels are x [H P], B [G N] and C [G N] in this order.

    silu follows the convolution, softplus comes before the limits of dt; states start from zero in every document of
    `seq_idx` [B, T]. Differentiable in every tensor.
    `backend`: `ops.backend` chooses. Raises `ConfigError` when "triton" is asked for and cannot run.
    """
    run = reference.mamba2_conv_scan
    width = (xBC_BTC.shape[-1] - 2 * groups * state) // A_H.shape[0]
    if choose("mamba2_conv_scan", xBC_BTC, backend, refusal(xBC_BTC.dtype, width, state)).name == "triton":
        from ssmtune.ops.mamba2_conv_scan import triton

        run = triton.mamba2_conv_scan
    return run(
        xBC_BTC,
        dt_BTH,
        A_H,
        conv_weight_CK,
        conv_bias_C,
        groups=groups,
        state=state,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
    )
