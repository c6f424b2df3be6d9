"""Affix-tuning, prefix form: learned positions between a recurrent layer's input projection and its convolution.

Source: Yoshimura et al., "MambaPEFT", ICLR 2025, section 3 (affix-tuning), for Mamba-1; for Mamba-2, Gated DeltaNet and
KDA the port is ours. Outputs at the positions are dropped, so rows of the output gate, which the paper counts, cannot act
and are left out: M D_in parameters per Mamba-1 layer and not 2 M D_in, with the same function.
The positions run once per pass (`ops.affix`); suffix and infix forms are not causal in this way and are not offered.
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
class AffixOptions:
    """Number of positions, and the width of the projection that makes them; None trains them as they are."""

    num_tokens: int = pydantic.Field(default=4, ge=1)
    projection: int | None = pydantic.Field(default=None, ge=1)
    init_std: float = pydantic.Field(default=0.02, gt=0)


def _num_params(shape: Sequence[int], options: AffixOptions) -> int:
    (width,) = shape
    hidden = options.projection
    if hidden is None:
        return options.num_tokens * width
    return options.num_tokens * hidden + hidden * (hidden + 1) + (hidden + 1) * width


def _make_state(shape: Sequence[int], options: AffixOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._positions import Positions

    (width,) = shape
    return Positions(width, num_tokens=options.num_tokens, hidden=options.projection, std=options.init_std)


METHOD = Method(
    in_module=False,
    summary="Positions in front of the text in every recurrent layer, compiled into its initial state and convolution window.",
    formula="M W for M positions (W: rows that convolution and recurrence read; Mamba-1: D_in; Mamba-2: D_in + 2 G N + H); "
    "with a projection of width h: M h + h (h + 1) + (h + 1) W",
    source="Yoshimura et al. 2025 (MambaPEFT), section 3",
    mergeable=False,
    overhead="none per token",
    Options=AffixOptions,
    allows=lambda component: component.role == "state.affix",
    num_params=_num_params,
    optimizer_group="state",
    make_state=_make_state,
    acts_at_start=True,
    starts_as_base=False,
    recipes={"affix": (Edit(method="affix", select=("state.affix",)),)},
)
