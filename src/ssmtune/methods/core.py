"""Core: the recurrence's own parameters A_log, D and dt_bias, trained as fp32 deltas on the frozen values.

In bf16 a step of the size that AdamW takes (about the learning rate) is lost to rounding unless the value is smaller
than 2^-4, so training these tensors in place hardly moves them; docs/methods/core.md derives the bound.
The sum stays fp32 up to the scan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows, num_elements
from ssmtune.methods.partial import Decay, pull
from ssmtune.recipe import EVERY_PROJECTION, Edit

if TYPE_CHECKING:
    import torch
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class CoreOptions:
    """`saved=False` is the control in which the trained core is thrown away at save time; `decay` as for `partial`."""

    saved: bool = True
    decay: Decay = "none"


def make_delta(weight: torch.Tensor, rows: Rows, options: object) -> nn.Module:
    """Return a zero delta for all of `weight`."""
    # Imported here: a plan is made, and help printed, without torch.
    import torch

    from ssmtune.methods._delta import Delta

    assert rows is None
    # fp32 up to the scan: rounding to the model's dtype would lose what was trained.
    return Delta(weight, dtype=torch.float32)


METHOD = Method(
    in_module=False,
    summary="The recurrence's own parameters (A_log, D, dt_bias and their like), as fp32 deltas.",
    formula="number of elements (Mamba-2: 3 per head)",
    source="Ford 2026 (Granite study, V4), with the storage corrected",
    mergeable=True,
    overhead="none",
    Options=CoreOptions,
    allows=lambda component: component.group == "core" and component.rows is None,
    num_params=num_elements,
    optimizer_group="core",
    make_edit=make_delta,
    value_kind="delta",
    decay_factor=lambda role, name, options: pull(role, options.decay),
    recipes={
        "core": (Edit(method="core", select=("core",)),),
        "core-v2": (Edit(method="core", select=("core",), options={"decay": "v2"}),),
        "control:core-discarded": (
            Edit(method="lora", select=EVERY_PROJECTION),
            Edit(method="core", select=("core",), options={"saved": False}),
        ),
    },
)
