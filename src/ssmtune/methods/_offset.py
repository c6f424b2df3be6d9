"""What the two variants of state-offset tuning share: a constant beside the recurrence, not fed back, without decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssmtune.methods.base import Method, NoOptions, num_elements
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    from torch import nn

STATE_FORMULA = "elements of the state (Mamba-1: D_in N; Mamba-2: H P N; Gated DeltaNet: H_v d_k d_v)"


def _make_state(shape: Sequence[int], options: object) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._state import State

    return State(shape)


def offset_method(name: str, role: str, *, summary: str, formula: str, overhead: str, adds: str) -> Method:
    """Return the method in the file `name`, which trains the offset with this role."""
    return Method(
        in_module=False,
        summary=summary,
        formula=formula,
        source="Kang et al. 2025 (state-offset tuning), section 4",
        mergeable=False,
        overhead=overhead,
        at_every_token=f"adds {adds}, where a plain layer adds nothing",
        Options=NoOptions,
        allows=lambda component: component.role == role,
        num_params=num_elements,
        optimizer_group="state",
        make_state=_make_state,
        value_kind="absolute",
        recipes={name.replace("_", "-"): (Edit(method=name, select=(role,)),)},
    )
