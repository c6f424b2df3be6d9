"""The Hankel adapter after balanced truncation: fewer modes, stored and trained as they are stepped.

Made by `ssmtune.truncate`, which puts its values in. The modes stay inside the unit circle however they are trained;
where a system has no well-conditioned modes it keeps a matrix ("matrix"), which nothing holds there but a small rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ReducedOptions:
    """Order n, of which `num_pairs` conjugate pairs take two each; and what the truncation measured.

    `full_order` is the order before (0 for a branch that was never longer), `bound` twice the sum of the discarded Hankel
    singular values and `error` the largest error over frequencies, both of the system without its gate. There is no
    bound where the Gramians were measured on data.
    """

    order: int = pydantic.Field(default=4, ge=1)
    num_pairs: int = pydantic.Field(default=1, ge=0)
    form: Literal["modes", "matrix"] = "modes"
    gate: Literal["scalar", "channel"] = "scalar"
    full_order: int = 0
    bound: float | None = None
    error: float | None = None

    @pydantic.model_validator(mode="after")
    def _pairs_fit(self) -> ReducedOptions:
        if 2 * self.num_pairs > self.order:
            raise ValueError(f"{self.num_pairs} conjugate pairs need an order of at least {2 * self.num_pairs}")
        return self


def _num_params(shape: Sequence[int], options: ReducedOptions) -> int:
    """2 n d, n numbers of the modes or n^2 of the matrix, and the gates."""
    inside = options.order if options.form == "modes" else options.order**2
    return 2 * options.order * shape[0] + inside + (1 if options.gate == "scalar" else shape[0])


def _make_branch(shape: Sequence[int], options: ReducedOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._branch import Branch
    from ssmtune.methods._dynamics import DenseDynamics, DiscreteModes

    if options.form == "matrix":
        dynamics: nn.Module = DenseDynamics(options.order)
    else:
        dynamics = DiscreteModes(options.order - 2 * options.num_pairs, options.num_pairs)
    return Branch(shape[0], options.order, dynamics, gates=1 if options.gate == "scalar" else shape[0])


METHOD = Method(
    in_module=False,
    summary="A Hankel branch after balanced truncation: B, C, its remaining modes and the gate.",
    formula="2 n d + n + 1 (a matrix: 2 n d + n^2 + 1; a gate per channel: d in place of 1)",
    source="Moore 1981 and Laub et al. 1987 (square-root balanced truncation); Thapliyal 2026 for its use",
    mergeable=False,
    overhead="4 n d FLOPs per token and block, and a state of n numbers per block in generation",
    at_every_token="runs a module beside a block, with a memory that no cache of transformers keeps",
    Options=ReducedOptions,
    allows=lambda component: component.group == "block",
    num_params=_num_params,
    optimizer_group="state",
    make_branch=_make_branch,
    value_kind="absolute",
)
