"""Component: a tensor of a model, or some of its rows, with a role; the vocabulary of families, methods and plans."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Group = Literal["attention", "recurrent", "mlp", "core", "conv", "norm", "embedding", "state", "block", "other"]
Access = Literal["module", "parameter"]

GROUPS: tuple[Group, ...] = ("attention", "recurrent", "mlp", "core", "conv", "norm", "embedding")
"""Groups that a recipe can select; "state" is what can be added to a recurrence and "block" a module that a branch
can run beside, neither of them a tensor of the model; "other" is what no method adapts (an image tower)."""


BRANCH = "branch"
"""Name that a branch has in the block that it runs beside."""

LAYER_NUMBER = re.compile(r"\.(\d+)\.")
"""The first number in a tensor's or module's name is its layer's."""


def layer_of(module_name: str) -> int | None:
    """Return the layer that a module belongs to, None outside the layers."""
    match = LAYER_NUMBER.search(f"{module_name}.")
    return int(match[1]) if match else None


@dataclass(frozen=True, kw_only=True)
class Component:
    """A tensor, or some rows of one, with a role. `rows` holds [first, end) ranges; None is the whole tensor."""

    role: str
    group: Group
    layer: int | None
    path: str
    shape: tuple[int, ...]
    access: Access
    rows: tuple[tuple[int, int], ...] | None = None

    @property
    def num_params(self) -> int:
        """Number of elements of the component."""
        return math.prod(self.shape)
