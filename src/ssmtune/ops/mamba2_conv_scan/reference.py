"""Convolution and scan one after the other, each as its own reference.

Source: Dao and Gu, "Transformers are SSMs", ICML 2024, section 7 (the Mamba-2 block).
"""

from __future__ import annotations

import torch

from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan


def mamba2_conv_scan(
    xBC_BTC: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor | None,
    *,
    groups: int,
    state: int,
    D_H: torch.Tensor | None,
    dt_bias_H: torch.Tensor | None,
    dt_limit: tuple[float, float],
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """Return y [B, T, H P]."""
    mixed = causal_conv1d(
        xBC_BTC.transpose(1, 2), conv_weight_CK, conv_bias_C, "silu", seq_idx=seq_idx, backend="reference"
    ).transpose(1, 2)
    x, B, C = split(mixed, A_H.shape[0], groups, state)
    y, _ = mamba2_chunk_scan(
        x,
        dt_BTH,
        A_H,
        B,
        C,
        D_H=D_H,
        dt_bias_H=dt_bias_H,
        dt_softplus=True,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
        backend="reference",
    )
    return y.flatten(2)


def split(
    xBC_BTC: torch.Tensor, heads: int, groups: int, state: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views x [B, T, H, P], B and C [B, T, G, N]."""
    inner = xBC_BTC.shape[-1] - 2 * groups * state
    x, B, C = torch.split(xBC_BTC, [inner, groups * state, groups * state], dim=-1)
    batch, steps = xBC_BTC.shape[:2]
    by_group = (batch, steps, groups, state)
    return x.view(batch, steps, heads, -1), B.view(by_group), C.view(by_group)
