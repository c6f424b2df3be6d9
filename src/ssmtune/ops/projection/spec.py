"""What a projection is given beside its input and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight [O, I] that is held as codes: `unpack` returns its values in `dtype`, in new memory at each call.

    They are there for one product at a time; what waits for the backward pass is this.
    """

    unpack: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: ClassVar[bool] = False


Weight = torch.Tensor | Packed


def dense(weight: Weight) -> torch.Tensor:
    """Return the values of a frozen weight; called where they are multiplied, and not held."""
    return weight.unpack() if isinstance(weight, Packed) else weight


class LowRank(NamedTuple):
    """The factors A [r, I] and B [O, r] of an adapter, what their product is multiplied by, and the dropout before A."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    dropout: float = 0.0
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None
    """A and scale * B in the dtype of the products, where the caller has them: many layers are rounded at once."""


class Normed(NamedTuple):
    """weight * norm(x silu(gate)): a root-mean-square norm over groups of `size` neighbours; gate [..., I] is optional."""

    weight_D: torch.Tensor
    eps: float
    gate: torch.Tensor | None = None
    size: int | None = None


class Activated(NamedTuple):
    """act(x), times `up` [..., I] where it is given; with `halves`, x holds what is activated and, behind it, `up`.

    Activations are "silu" and "relu2", the square of the positive part.
    """

    activation: str
    up: torch.Tensor | None = None
    halves: bool = False


Prologue = Normed | Activated
