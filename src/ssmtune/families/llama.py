"""Llama (`llama`): the plain transformer that hybrid results are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._transformer import TRANSFORMER, TRANSFORMER_CONFIG, prepare_packed
from ssmtune.families.base import Family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import LlamaConfig

    make = partial(
        LlamaConfig,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=40,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(num_key_value_heads=2, tie_word_embeddings=True),
        "biases": make(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
        "one-layer": make(num_hidden_layers=1, num_attention_heads=3, hidden_size=24, num_key_value_heads=1),
    }


FAMILY = Family(
    model_types=("llama",),
    topology="transformer",
    backbone="model",
    prepare_packed=prepare_packed,
    tiny_configs=_tiny_configs,
    claims=TRANSFORMER,
    handled_config=TRANSFORMER_CONFIG | {"attention_bias", "mlp_bias", "pretraining_tp"},
)
