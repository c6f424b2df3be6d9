"""Static parallel adapter: the control of the Hankel adapter, with the same site, B, C and gate, and no memory.

y_t = g C B x_t: the Hankel branch with its decays at zero. What the two differ by is what the recurrence adds.
"""

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
class ParallelOptions:
    """Rank n; the gate is one number and starts at zero."""

    order: int = pydantic.Field(default=32, ge=1)


def _make_branch(shape: Sequence[int], options: ParallelOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._branch import Branch

    return Branch(shape[0], options.order, None, gates=1)


METHOD = Method(
    in_module=False,
    summary="Control: a linear bottleneck of rank n parallel to a block, without memory.",
    formula="2 n d + 1",
    source="He et al. 2022 (parallel adapter), without its nonlinearity; control of `hankel`",
    mergeable=False,
    overhead="4 n d FLOPs per token and block",
    at_every_token="runs a module beside a block",
    Options=ParallelOptions,
    allows=lambda component: component.group == "block",
    num_params=lambda shape, options: 2 * options.order * shape[0] + 1,
    optimizer_group="state",
    make_branch=_make_branch,
    value_kind="absolute",
    recipes={"parallel": (Edit(method="parallel", select=("block.mlp",)),)},
)
