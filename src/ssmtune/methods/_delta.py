"""A whole tensor trained: as a change in fp32, or, for a control, as a copy in its own dtype."""

from __future__ import annotations

import torch
from torch import nn


class Delta(nn.Module):
    """The effective tensor is W + delta, summed in fp32 and given on in `dtype`; delta starts at zero."""

    enabled = True

    def __init__(self, weight: torch.Tensor, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [*] in `dtype` (fp32 for an fp32 weight); the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        return (weight.float() + self.delta).to(torch.promote_types(self.dtype, weight.dtype))

    def trained(self) -> dict[str, nn.Parameter]:
        """The delta."""
        return {"": self.delta}


class InPlace(nn.Module):
    """The effective tensor is a trained copy in the weight's own dtype."""

    enabled = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(weight.detach().clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained copy, [*], in the weight's dtype; the weight itself where the edit is switched off."""
        return self.value if self.enabled else weight

    def trained(self) -> dict[str, nn.Parameter]:
        """The copy."""
        return {"": self.value}
