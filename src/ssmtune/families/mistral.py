"""Mistral (`mistral`): a plain transformer whose layers all attend within one sliding window, or to everything."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._transformer import TRANSFORMER, TRANSFORMER_CONFIG, packed_mask
from ssmtune.families.base import Family

if TYPE_CHECKING:
    import torch
    from torch import nn


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    config: Any = backbone.config
    return {"attention_mask": packed_mask(backbone, position_ids, sliding=config.sliding_window is not None)}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import MistralConfig

    make = partial(
        MistralConfig,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "sliding": make(sliding_window=5),
        "full": make(sliding_window=None, tie_word_embeddings=True, head_dim=12),
        "odd": make(
            num_hidden_layers=1, hidden_size=24, num_attention_heads=3, num_key_value_heads=1, sliding_window=2
        ),
    }


FAMILY = Family(
    model_types=("mistral",),
    topology="transformer",
    backbone="model",
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=TRANSFORMER,
    handled_config=TRANSFORMER_CONFIG | {"sliding_window"},
)
