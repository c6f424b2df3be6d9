"""Control: the core trained in place in the model's own dtype, as published studies do.

On a bf16 model almost nothing moves (docs/methods/core.md), which is what this control is there to show.
It is not a way to train a model: recipes reach it only under a name that starts with "control:".
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ssmtune.methods import core
from ssmtune.methods.base import Rows
from ssmtune.methods.core import CoreOptions
from ssmtune.recipe import EVERY_PROJECTION, Edit


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


def _make_edit(weight: torch.Tensor, rows: Rows, options: CoreOptions) -> InPlace:
    return InPlace(weight)


METHOD = replace(
    core.METHOD,
    summary="Control: A_log, D and dt_bias trained in place in the model's dtype, where rounding loses the updates.",
    source="Ford 2026 (Granite study, V3 and V4 as released)",
    make_edit=_make_edit,
    value_kind="absolute",
    recipes={
        "control:core-in-place": (
            Edit(method="lora", select=EVERY_PROJECTION),
            Edit(method="core_in_place", select=("core",)),
        ),
    },
)
