"""Core: the recurrence's own parameters A_log, D and dt_bias, trained as fp32 deltas on the frozen values.

In bf16 a step of the size that AdamW takes (about the learning rate) is lost to rounding unless the value is smaller
than 2^-4, so training these tensors in place hardly moves them; docs/methods/core.md derives the bound.
The sum stays fp32 up to the scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pydantic
import torch
from torch import nn

from ssmtune.config import STRICT
from ssmtune.methods.base import Method


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class CoreOptions:
    """`saved=False` is the control in which the trained core is thrown away at save time."""

    saved: bool = True


class Delta(nn.Module):
    """The effective tensor is W + delta in fp32; delta starts at zero."""

    enabled = True

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [*] fp32 for a weight [*] of any dtype; the weight itself where the edit is switched off."""
        return weight.float() + self.delta if self.enabled else weight

    def trained(self) -> nn.Parameter:
        """The delta."""
        return self.delta


def make_delta(weight: torch.Tensor, options: CoreOptions) -> Delta:
    """Return a zero delta for `weight`."""
    return Delta(weight)


def _num_elements(shape: Sequence[int], options: object) -> int:
    """Every element of the tensor trains."""
    return math.prod(shape)


METHOD = Method(
    kind="tensor",
    summary="A_log, D and dt_bias of every recurrent layer, as fp32 deltas.",
    formula="number of elements (Mamba-2: 3 per head)",
    source="Ford 2026 (Granite study, V4), with the storage corrected",
    mergeable=True,
    overhead="none",
    Options=CoreOptions,
    allowed_roles=frozenset({"ssm.A_log", "ssm.D", "ssm.dt_bias"}),
    num_params=_num_elements,
    optimizer_group="core",
    make_edit=make_delta,
    value_kind="delta",
)
