"""What a Mamba-2 mixer is given beside its input: its core, and each of its projections with the norm before it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ssmtune.ops.projection.spec import LowRank, Normed, Weight


class Core(NamedTuple):
    """Convolution and scan, as `mamba2_conv_scan` takes them. H heads, C channels, K taps."""

    A_H: torch.Tensor
    D_H: torch.Tensor | None
    dt_bias_H: torch.Tensor | None
    conv_weight_CK: torch.Tensor
    conv_bias_C: torch.Tensor | None
    groups: int
    state: int
    dt_limit: tuple[float, float] = (0.0, math.inf)


class Adapted(NamedTuple):
    """A frozen projection [O, I] with its bias and low-rank term, and the norm before it."""

    norm: Normed
    weight_OI: Weight
    bias_O: torch.Tensor | None = None
    low_rank: LowRank | None = None
