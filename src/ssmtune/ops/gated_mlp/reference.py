"""The gated MLP as its two projections."""

from __future__ import annotations

import torch

from ssmtune.ops.projection import projection
from ssmtune.ops.projection.spec import Activated, LowRank, Normed, Weight


def gated_mlp(
    x: torch.Tensor,
    norm: Normed,
    in_weight_2KD: Weight,
    out_weight_DK: Weight,
    in_low_rank: LowRank | None,
    out_low_rank: LowRank | None,
    multiplier: float,
) -> torch.Tensor:
    """Return x + multiplier * out(silu(g) * u)."""
    wide = projection(x, in_weight_2KD, low_rank=in_low_rank, prologue=norm)
    return projection(
        wide,
        out_weight_DK,
        low_rank=out_low_rank,
        prologue=Activated("silu", halves=True),
        residual=x,
        multiplier=multiplier,
    )
