"""State-offset tuning, h variant: a trained h' is added to the state wherever it is read out, y_t + C_t h'.

Source: Kang et al., "State-offset Tuning", ACL 2025, section 4; for Mamba-2 and Gated DeltaNet the port is ours.
It is not fed back into the recurrence and does not decay.
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
    summary="A constant added to the state at every read-out.",
    formula="elements of the state (Mamba-1: D_in N; Mamba-2: H P N; Gated DeltaNet: H_v d_k d_v)",
    source="Kang et al. 2025 (state-offset tuning), section 4",
    mergeable=False,
    overhead="one more read-out contraction per token",
    Options=StateOffsetOptions,
    allows=lambda component: component.role == "state.state_offset",
    num_params=lambda shape, options: math.prod(shape),
    optimizer_group="core",
    make_state=_make_state,
    value_kind="absolute",
)
