"""Qwen3 (`qwen3`): a plain transformer with a norm on each head's queries and keys, some layers within a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._transformer import LAYER, TRANSFORMER, TRANSFORMER_CONFIG, packed_mask
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    config: Any = backbone.config
    kinds = sorted(set(config.layer_types))
    return {
        "attention_mask": {
            kind: packed_mask(backbone, position_ids, sliding=kind == "sliding_attention") for kind in kinds
        }
    }


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Qwen3Config

    make = partial(
        Qwen3Config,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=40,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(tie_word_embeddings=True),
        "sliding": make(use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "odd": make(
            num_hidden_layers=1, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, attention_bias=True
        ),
    }


FAMILY = Family(
    model_types=("qwen3",),
    topology="transformer",
    backbone="model",
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *TRANSFORMER,
        Claim(path=LAYER + "self_attn.q_norm.weight", role="norm.q", group="norm"),
        Claim(path=LAYER + "self_attn.k_norm.weight", role="norm.k", group="norm"),
    ),
    handled_config=TRANSFORMER_CONFIG
    | {"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
)
