"""Initial-state tuning (S0): every recurrence starts from a trained state instead of zero.

Source: Young, "S0 tuning", arXiv 2604.01168 (2026), section 3; Galim et al., ICML 2025, for Mamba-1.
Affine in S0: y_t = y_t(0) + C_t (prod_{i<=t} a_i) S0 for diagonal recurrences, so its effect fades with the decay.
The released code trains at scale 1 and scales the state when it is used; the paper scales it in training as well. Both
scales are options here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods._offset import STATE_FORMULA
from ssmtune.methods.base import Method, num_elements
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class InitialStateOptions:
    """Scale of the state in training, and in evaluation and use."""

    train_scale: float = pydantic.Field(default=1.0, gt=0)
    deploy_scale: float = pydantic.Field(default=1.0, gt=0)


def _make_state(shape: Sequence[int], options: InitialStateOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._state import State

    return State(shape, train_scale=options.train_scale, deploy_scale=options.deploy_scale)


METHOD = Method(
    in_module=False,
    summary="The state that every recurrence starts from, instead of zero.",
    formula=STATE_FORMULA,
    source="Young 2026 (S0 tuning), section 3; Galim et al. 2025",
    mergeable=False,
    overhead="none per token",
    Options=InitialStateOptions,
    allows=lambda component: component.role == "state.initial_state",
    num_params=num_elements,
    optimizer_group="state",
    make_state=_make_state,
    acts_at_start=True,
    value_kind="absolute",
    recipes={"initial-state": (Edit(method="initial_state", select=("state.initial_state",)),)},
)
