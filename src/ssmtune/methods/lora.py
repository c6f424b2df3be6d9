"""LoRA: W' = W + (alpha / r) B A on projections, whole or some of their rows.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.
Where every path calls the projection, the layer is PEFT's. Where a path reads the tensor raw (Mamba-1's dt_proj), where
several modules share it, or where only some rows train, the sum is made on the tensor itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component

LOW_RANK_GROUPS = ("attention", "recurrent", "mlp", "embedding")


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraOptions:
    """Rank r, alpha, and the dropout: on the input of A, or, for an edit of the tensor, on the rows of A."""

    rank: int = pydantic.Field(default=16, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)


def _make_edit(weight: torch.Tensor, rows: Rows, options: LoraOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._low_rank import LowRank

    return LowRank(weight, rows, rank=options.rank, alpha=options.alpha, dropout=options.dropout)


def _num_params(shape: Sequence[int], options: LoraOptions) -> int:
    """r (in + out) for a matrix [out, in]; that for each of E experts of a packed tensor [E, out, in]."""
    *experts, num_out, num_in = shape
    return options.rank * (num_in + num_out) * (experts[0] if experts else 1)


def _allows(component: Component) -> bool:
    """Matrices of every projection and their row ranges; packed experts as a whole; no router, which only ranks."""
    whole_or_matrix = len(component.shape) == 2 or (len(component.shape) == 3 and component.rows is None)
    return whole_or_matrix and component.group in LOW_RANK_GROUPS and component.role != "moe.router"


METHOD = Method(
    in_module=True,
    summary="Low-rank factors A [r, in] and B [out, r] beside a frozen projection, or beside some of its rows.",
    formula="r (in + out); times the number of experts for packed experts",
    source="Hu et al. 2022, section 4.1; container: PEFT, or an edit of the tensor",
    mergeable=True,
    overhead="none once merged",
    Options=LoraOptions,
    allows=_allows,
    num_params=_num_params,
    optimizer_group="lora",
    waits=("lora_A",),
    make_edit=_make_edit,
)
