"""The mixer as its operations, one after the other.

Source: Dao and Gu, "Transformers are SSMs", ICML 2024, section 7 (the Mamba-2 block).
"""

from __future__ import annotations

import torch

from ssmtune.ops.mamba2_conv_scan import mamba2_conv_scan
from ssmtune.ops.mamba2_mixer.spec import Adapted, Core
from ssmtune.ops.projection import projection


def mamba2_mixer(
    x_BTD: torch.Tensor,
    inner: Adapted,
    core: Core,
    outer: Adapted,
    *,
    residual: bool,
    multiplier: float,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """Return x + multiplier * out(gated_norm(y, z))."""
    projected = projection(x_BTD, inner.weight_OI, inner.bias_O, low_rank=inner.low_rank, prologue=inner.norm)
    y, gate = conv_scan(projected, core, seq_idx)
    return projection(
        y,
        outer.weight_OI,
        outer.bias_O,
        low_rank=outer.low_rank,
        prologue=outer.norm._replace(gate=gate),
        residual=x_BTD if residual else None,
        multiplier=multiplier,
    )


def conv_scan(projected: torch.Tensor, core: Core, seq_idx: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scan's output [B, T, H P] and the gate z of the same shape, from what the inner projection gave."""
    gate, xBC, dt = split(projected, core)
    y = mamba2_conv_scan(
        xBC,
        dt,
        core.A_H,
        core.conv_weight_CK,
        core.conv_bias_C,
        groups=core.groups,
        state=core.state,
        D_H=core.D_H,
        dt_bias_H=core.dt_bias_H,
        dt_limit=core.dt_limit,
        seq_idx=seq_idx,
    )
    return y, gate


def split(projected: torch.Tensor, core: Core) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return views z [B, T, H P], xBC [B, T, C] and dt [B, T, H] of what the inner projection gave."""
    channels, heads = core.conv_weight_CK.shape[0], core.A_H.shape[0]
    z, xBC, dt = torch.split(projected, [projected.shape[-1] - channels - heads, channels, heads], dim=-1)
    return z, xBC, dt
