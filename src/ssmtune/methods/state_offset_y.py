"""State-offset tuning, y variant: a trained y' is added to the recurrence's output at every step.

Source: Kang et al., "State-offset Tuning", ACL 2025, section 4; for Mamba-2 and Gated DeltaNet the port is ours.
It acts before the gate and the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class StateOffsetOptions:
    """Nothing to choose."""


def _make_state(shape: Sequence[int], options: object) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._state import State

    return State(shape)


METHOD = Method(
    in_module=False,
    summary="A constant added to the recurrence's output, before gate and norm.",
    formula="elements of the output (Mamba-1: D_in; Mamba-2: H P; Gated DeltaNet: H_v d_v)",
    source="Kang et al. 2025 (state-offset tuning), section 4",
    mergeable=False,
    overhead="one addition per token",
    Options=StateOffsetOptions,
    allows=lambda component: component.role == "state.output_offset",
    num_params=lambda shape, options: math.prod(shape),
    optimizer_group="core",
    make_state=_make_state,
    value_kind="absolute",
)
