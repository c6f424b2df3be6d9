"""ProDiaL: W' = s (W D) + B A on projections, with D block-diagonal, s a scale of each output, and B A of low rank.

Source: "Parameter Efficient Mamba Tuning via Projector-targeted Diagonal-centric Linear Transformation", CVPR 2025, arXiv
2411.15224. The paper tunes the input and output projectors of a Mamba layer through a transformation of their input that
stays near the identity. Only secondary descriptions of it could be read here, which fix the form above and the identity
at the start; our reading of the rest is: D = I - blocks with the blocks at zero (the paper keeps the diagonal's part
non-negative by a relu, which at zero would have no gradient and is left out), s at one, B at zero, and the scale of B A
as LoRA's, alpha / r. Which of the paper's figures this variant reproduces has not been tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows
from ssmtune.methods.lora import is_projection, low_rank_params
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ProdialOptions:
    """Size b of D's blocks, and rank and alpha of the product B A."""

    block: int = pydantic.Field(default=4, ge=1)
    rank: int = pydantic.Field(default=16, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)


def _make_edit(weight: torch.Tensor, rows: Rows, options: ProdialOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._low_rank import Scaled

    return Scaled(weight, rows, rank=options.rank, scale=options.alpha / options.rank, block=options.block)


def _num_params(shape: Sequence[int], options: ProdialOptions) -> int:
    """r (in + out) + out + floor(in / b) b^2 + (in mod b)^2 for a matrix [out, in]."""
    num_out, num_in = shape
    whole, rest = divmod(num_in, options.block)
    return low_rank_params(shape, options) + num_out + whole * options.block**2 + rest**2


def _allows(component: Component) -> bool:
    """The projections of recurrent layers and their row ranges: the method is made for a Mamba layer's projectors."""
    return component.group == "recurrent" and len(component.shape) == 2 and is_projection(component)


METHOD = Method(
    in_module=False,
    summary="A block-diagonal transformation of the projection's input, a scale of each output, and low-rank factors.",
    formula="r (in + out) + out + b in, with the last block cut where b does not divide in",
    source="ProDiaL, CVPR 2025, arXiv 2411.15224; our reading, see the file",
    mergeable=True,
    overhead="none once merged",
    Options=ProdialOptions,
    allows=_allows,
    num_params=_num_params,
    optimizer_group="lora",
    make_edit=_make_edit,
    value_kind="composed",
    size_option="rank",
    # The scale starts at one: decay would pull the weight to zero with it.
    decay_factor=lambda role, name, options: 0.0 if name == "lora_scale" else 1.0,
    waits=("lora_A",),
    recipes={"prodial": (Edit(method="prodial", select=("recurrent",)),)},
)
