"""A trained addition to a recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class State(nn.Module):
    """A tensor that starts at zero; its value in use is scaled, in training by one number and elsewhere by another."""

    enabled = True

    def __init__(self, shape: Sequence[int], *, train_scale: float = 1.0, deploy_scale: float = 1.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(*shape, dtype=torch.float32))
        self.train_scale, self.deploy_scale = train_scale, deploy_scale

    def forward(self) -> torch.Tensor:
        """Return the scaled value, fp32, without batch."""
        return self.value * (self.train_scale if self.training else self.deploy_scale)

    def trained(self) -> dict[str, nn.Parameter]:
        """The unscaled value."""
        return {"": self.value}
