"""LoRA: W' = W + (alpha / r) B A on projections that every execution path calls; the layer is PEFT's.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraOptions:
    """Rank r, alpha, and the dropout on the input of A."""

    rank: int = pydantic.Field(default=16, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)


def _num_params(shape: Sequence[int], options: LoraOptions) -> int:
    """r (in + out) for a matrix [out, in]; that for each of E experts of a packed tensor [E, out, in]."""
    *experts, num_out, num_in = shape
    return options.rank * (num_in + num_out) * (experts[0] if experts else 1)


METHOD = Method(
    kind="module",
    summary="Low-rank factors A [r, in] and B [out, r] beside a frozen projection.",
    formula="r (in + out); times the number of experts for packed experts",
    source="Hu et al. 2022, section 4.1; container: PEFT",
    mergeable=True,
    overhead="none once merged",
    Options=LoraOptions,
    allowed_roles=frozenset(
        """
        attn.q attn.k attn.v attn.o ssm.in ssm.out mlp.in mlp.out mlp.gate mlp.up mlp.down
        moe.experts.in moe.experts.out
        """.split()
    ),
    num_params=_num_params,
    optimizer_group="lora",
)
