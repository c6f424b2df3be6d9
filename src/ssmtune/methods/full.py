"""Full fine-tuning: every tensor of the language model trained as an fp32 change of the frozen value.

The change is summed in fp32 and rounded to the model's dtype where it is used, as mixed-precision training with fp32
master weights does; the recipe gives the recurrence's core to `core`, whose sum stays fp32 up to the scan. Weight decay
pulls to the pretrained weights, not to zero. A tied tensor has one change. An image tower stays as it is.
It costs four bytes a parameter for the change, as much for its gradient, and twice that for AdamW.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmtune.methods.base import Method, NoOptions, Rows, num_elements
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component


def _allows(component: Component) -> bool:
    """Whole tensors of every group but the core, which has a method of its own, and what no text reaches."""
    return component.rows is None and component.group not in ("core", "state", "block", "other")


def _make_edit(weight: torch.Tensor, rows: Rows, options: object) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._delta import Delta

    assert rows is None
    return Delta(weight, dtype=weight.dtype)


METHOD = Method(
    in_module=False,
    summary="Every tensor outside the core as a whole, as fp32 deltas on the frozen values; with `core`, the model.",
    formula="number of elements",
    source="full fine-tuning, with the change kept apart from the weight",
    mergeable=True,
    overhead="none once merged",
    Options=NoOptions,
    allows=_allows,
    num_params=num_elements,
    optimizer_group="lora",
    make_edit=_make_edit,
    value_kind="delta",
    recipes={
        "full": (
            Edit(method="full", select=("everything",)),
            Edit(method="core", select=("core",), if_present=True),
        )
    },
)
