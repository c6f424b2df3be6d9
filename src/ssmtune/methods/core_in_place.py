"""Control: the core trained in place in the model's own dtype, as published studies do.

On a bf16 model almost nothing moves (docs/methods/core.md), which is what this control is there to show.
It is not a way to train a model: recipes reach it only under a name that starts with "control:".
"""

from __future__ import annotations

import torch
from torch import nn

from ssmtune.methods.base import Method
from ssmtune.methods.core import ROLES, CoreOptions, num_elements


class InPlace(nn.Module):
    """The effective tensor is a trained copy in the weight's own dtype."""

    enabled = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(weight.detach().clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the trained copy, [*], in the weight's dtype; the weight itself where the edit is switched off."""
        return self.value if self.enabled else weight

    def trained(self) -> nn.Parameter:
        """The copy."""
        return self.value


def _make_edit(weight: torch.Tensor, options: CoreOptions) -> InPlace:
    return InPlace(weight)


METHOD = Method(
    kind="tensor",
    summary="Control: A_log, D and dt_bias trained in place in the model's dtype, where rounding loses the updates.",
    formula="number of elements (Mamba-2: 3 per head)",
    source="Ford 2026 (Granite study, V3 and V4 as released)",
    mergeable=True,
    overhead="none",
    Options=CoreOptions,
    allowed_roles=ROLES,
    num_params=num_elements,
    optimizer_group="core",
    make_edit=_make_edit,
    value_kind="absolute",
)
