"""Gemma (`gemma`): a plain transformer whose norms scale by 1 + weight and whose embeddings are scaled by sqrt(width)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._transformer import TRANSFORMER, TRANSFORMER_CONFIG, prepare_packed
from ssmtune.families.base import Family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import GemmaConfig

    make = partial(
        GemmaConfig,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=40,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(),
        "biases": make(attention_bias=True, num_key_value_heads=4, tie_word_embeddings=False, hidden_act="silu"),
        "odd": make(num_hidden_layers=1, hidden_size=24, num_attention_heads=3, head_dim=6),
    }


FAMILY = Family(
    model_types=("gemma",),
    topology="transformer",
    backbone="model",
    prepare_packed=prepare_packed,
    tiny_configs=_tiny_configs,
    claims=TRANSFORMER,
    # hidden_activation: in published configs beside hidden_act, which is the one that the layers read.
    handled_config=TRANSFORMER_CONFIG | {"attention_bias", "hidden_activation"},
)
