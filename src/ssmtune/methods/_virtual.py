"""What prompt and prefix share: M learned vectors of the model's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PositionsOptions:
    """Number of positions, and the standard deviation that they are drawn with."""

    num_tokens: int = pydantic.Field(default=16, ge=1)
    init_std: float = pydantic.Field(default=0.02, gt=0)


def _num_params(shape: Sequence[int], options: PositionsOptions) -> int:
    (width,) = shape
    return options.num_tokens * width


def _make_state(shape: Sequence[int], options: PositionsOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._positions import Positions

    (width,) = shape
    return Positions(width, num_tokens=options.num_tokens, std=options.init_std)


def positions_method(name: str, *, summary: str, formula: str, source: str, needs: str) -> Method:
    """Return the method in the file `name`, which trains the positions with the role `state.<name>`."""
    role = f"state.{name}"
    return Method(
        in_module=False,
        summary=summary,
        formula=formula,
        source=source,
        mergeable=False,
        overhead="M more tokens to prefill; in attention also M more to attend to",
        Options=PositionsOptions,
        allows=lambda component: component.role == role,
        num_params=_num_params,
        optimizer_group="state",
        make_state=_make_state,
        acts_at_start=True,
        starts_as_base=False,
        needs=needs,
        recipes={name: (Edit(method=name, select=(role,)),)},
    )
