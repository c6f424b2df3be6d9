"""Recipe: a named list of edits, each a method and what it selects; the vocabulary of placements and method files."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import pydantic

from ssmtune.config import STRICT


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Edit:
    """Apply `method` with `options` to every component that `select` names.

    `select` entries are groups ("attention"), roles ("ssm.in", "ssm.in.x", or "ssm.out|gdn.out" for either of two),
    "biases", "everything", or "allowed" for all that the method can edit, row ranges among it; `modules` entries are
    module names as used in target lists ("q_proj"); `layers` restricts either; `share` draws that part of the selected
    sites at random; `if_present` lets the edit select nothing in a model that has no such component.
    """

    method: str
    select: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    share: float = pydantic.Field(default=1.0, gt=0, le=1)
    seed: int = 0
    if_present: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A named placement and method: what a YAML file under `recipe:` holds.

    `without` names roles or groups that no edit may touch, with everything below a role ("attn.q" stands for
    "attn.q.bias" as well): a group leaves them out, and where a tensor holds their rows beside others, those others
    are edited as rows.
    """

    name: str
    edits: tuple[Edit, ...]
    allow_unmatched: bool = False
    without: tuple[str, ...] = ()


EVERY_PROJECTION = ("attention", "recurrent", "mlp")
"""The groups that low-rank methods adapt when a recipe names no other."""
