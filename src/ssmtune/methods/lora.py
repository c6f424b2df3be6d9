"""LoRA: W' = W + (alpha / r) B A on projections, whole or some of their rows.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1; `scaling="rs"`, alpha /
sqrt r: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, section 3; `init="pissa"`:
Meng et al., "PiSSA", NeurIPS 2024, section 3.
Where every path calls the projection, the layer is PEFT's. Where a path reads the tensor raw (Mamba-1's dt_proj), where
several modules share it, or where only some rows train, the sum is made on the tensor itself.
PiSSA starts A and B at the weight's principal part and freezes the rest. PEFT writes that rest over the weight; here the
weight stays as it is and the start is subtracted instead, W' = W + s (B A - B0 A0), which is the same function. This
needs the tensor edit at every site; B0 and A0 are saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

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
    """Rank r, alpha, and the dropout: on the input of A, or, for an edit of the tensor, on the rows of A.

    `scaling`: the product is scaled by alpha / r ("standard") or alpha / sqrt r ("rs"). `init`: B at zero ("default"),
    or both factors at the weight's r largest singular values ("pissa").
    """

    rank: int = pydantic.Field(default=16, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    scaling: Literal["standard", "rs"] = "standard"
    init: Literal["default", "pissa"] = "default"


def effective_alpha(options: Mapping[str, Any]) -> float:
    """Return the alpha that, over r, is the scale of a site's product: alpha sqrt r with "rs" scaling.

    >>> effective_alpha({"rank": 4, "alpha": 8.0, "scaling": "rs"})
    16.0
    """
    alpha, is_rs = float(options["alpha"]), options.get("scaling") == "rs"
    return alpha * math.sqrt(options["rank"]) if is_rs else alpha


def _make_edit(weight: torch.Tensor, rows: Rows, options: LoraOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._low_rank import LowRank

    scale = effective_alpha(asdict(options)) / options.rank
    principal = options.init == "pissa"
    return LowRank(weight, rows, rank=options.rank, scale=scale, dropout=options.dropout, principal=principal)


def _refuses(shape: Sequence[int], options: LoraOptions) -> str:
    """A matrix has no more principal directions than its smaller side."""
    if options.init == "pissa" and options.rank > min(shape[-2:]):
        return f"init 'pissa' takes {options.rank} singular directions of a matrix of {shape[-2]} x {shape[-1]}"
    return ""


def low_rank_params(shape: Sequence[int], options: Any) -> int:
    """r (in + out) for a matrix [out, in]; that for each of E experts of a packed tensor [E, out, in]."""
    *experts, num_out, num_in = shape
    num_params: int = options.rank * (num_in + num_out) * (experts[0] if experts else 1)
    return num_params


def is_projection(component: Component) -> bool:
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
    allows=is_projection,
    num_params=low_rank_params,
    optimizer_group="lora",
    waits=("lora_A",),
    make_edit=_make_edit,
    size_option="rank",
    refuses=_refuses,
    needs_tensor=lambda shape, options: options.init == "pissa",
)
