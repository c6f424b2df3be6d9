"""Learned positions: a table, or what two linear layers with a tanh between them make of one."""

from __future__ import annotations

import torch
from torch import nn


class Positions(nn.Module):
    """M vectors of width W, fp32, drawn small: they have no value at which they would do nothing.

    With `hidden` h they are Linear(tanh(Linear(table))) of a table [M, h], as prefix encoders make them.
    """

    enabled = True

    def __init__(self, width: int, *, num_tokens: int, hidden: int | None = None, std: float) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.table = nn.Parameter(std * torch.randn(num_tokens, width if hidden is None else hidden))
        self.projection = None
        if hidden is not None:
            self.projection = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self) -> torch.Tensor:
        """Return the positions [M, W], fp32."""
        if self.projection is None:
            return self.table
        with torch.autocast(self.table.device.type, enabled=False):
            positions: torch.Tensor = self.projection(self.table)
        return positions

    def trained(self) -> dict[str, nn.Parameter]:
        """The table, and the weights and biases of the projection."""
        return dict(self.named_parameters())
