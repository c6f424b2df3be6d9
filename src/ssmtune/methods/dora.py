"""DoRA: W' = m (W + s B A) / |W + s B A|, a low-rank change of the direction of each row and a magnitude m of its own.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, sections 4.1 and 4.3: the norm is treated as
a constant in the backward pass. m is one number for each output, which is the norm of a row of W [out, in].
Where every path calls the projection, the layer is PEFT's; on tensors that are read raw, shared or packed, and on rows,
the effective weight is computed. One adapter of PEFT is DoRA as a whole or not at all, so a plan with both DoRA and LoRA
on called projections is refused. The magnitudes do not decay: pulled to zero they would pull the weight with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows
from ssmtune.methods.lora import effective_alpha, is_projection, low_rank_params
from ssmtune.recipe import EVERY_PROJECTION, Edit

if TYPE_CHECKING:
    import torch
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class DoraOptions:
    """As LoRA's: rank r, alpha, dropout, and alpha / r ("standard") or alpha / sqrt r ("rs") as the product's scale."""

    rank: int = pydantic.Field(default=16, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    scaling: Literal["standard", "rs"] = "standard"


def _make_edit(weight: torch.Tensor, rows: Rows, options: DoraOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._low_rank import Decomposed

    scale = effective_alpha(asdict(options)) / options.rank
    return Decomposed(weight, rows, rank=options.rank, scale=scale, dropout=options.dropout)


def _num_params(shape: Sequence[int], options: DoraOptions) -> int:
    """r (in + out) + out for a matrix [out, in]; that for each of E experts of a packed tensor [E, out, in]."""
    *experts, num_out, _ = shape
    return low_rank_params(shape, options) + num_out * (experts[0] if experts else 1)


METHOD = Method(
    in_module=True,
    summary="Low-rank factors A [r, in] and B [out, r], and the magnitude of each row of the projection.",
    formula="r (in + out) + out; times the number of experts for packed experts",
    source="Liu et al. 2024 (DoRA), sections 4.1 and 4.3; container: PEFT, or an edit of the tensor",
    mergeable=True,
    overhead="none once merged",
    Options=DoraOptions,
    allows=is_projection,
    num_params=_num_params,
    optimizer_group="lora",
    make_edit=_make_edit,
    value_kind="composed",
    size_option="rank",
    # PEFT's layer around packed experts has no DoRA.
    needs_tensor=lambda shape, options: len(shape) == 3,
    peft_switches={"use_dora": True},
    decay_factor=lambda role, name, options: 0.0 if "magnitude" in name else 1.0,
    waits=("lora_A",),
    recipes={"dora": (Edit(method="dora", select=EVERY_PROJECTION),)},
)
