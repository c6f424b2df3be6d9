"""Membranes of one gate.

Dims: D channels of the gate, R membranes.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Membrane(nn.Module):
    """Projections of the gate into its membranes, `membrane_in` [R, D], and back, `membrane_out` [D, R], fp32.

    The second starts at zero, so that membranes charge and nothing comes of it.
    """

    enabled = True

    def __init__(self, channels: int, *, rank: int, chunk: int, leak: float, threshold: float) -> None:
        super().__init__()
        self.chunk, self.leak, self.threshold = chunk, leak, threshold
        self.membrane_in = nn.Parameter(torch.empty(rank, channels))
        nn.init.kaiming_uniform_(self.membrane_in, a=math.sqrt(5))
        self.membrane_out = nn.Parameter(torch.zeros(channels, rank))

    def trained(self) -> dict[str, nn.Parameter]:
        """Both projections."""
        return dict(self.named_parameters())
