"""Control: the core trained in place in the model's own dtype, as published studies do.

On a bf16 model almost nothing moves (docs/methods/core.md), which is what this control is there to show.
It is not a way to train a model: recipes reach it only under a name that starts with "control:".
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ssmtune.methods import core
from ssmtune.methods.base import Rows
from ssmtune.methods.core import CoreOptions
from ssmtune.recipe import EVERY_PROJECTION, Edit

if TYPE_CHECKING:
    import torch
    from torch import nn


def _make_edit(weight: torch.Tensor, rows: Rows, options: CoreOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._delta import InPlace

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
