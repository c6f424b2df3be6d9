"""Llama (`llama`): the plain transformer that hybrid results are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYER = "model.layers.{layer}."


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """The model builds its mask from `position_ids` itself, provided that no padding mask is given beside it."""
    return {"attention_mask": None}


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
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="model.embed_tokens.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        Claim(path="model.norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "post_attention_layernorm.weight", role="norm.mlp", group="norm"),
        *(
            Claim(path=f"{LAYER}self_attn.{name}_proj.{kind}", role=f"attn.{name}{suffix}", group="attention")
            for name in "qkvo"
            for kind, suffix in (("weight", ""), ("bias", ".bias"))
        ),
        *(
            Claim(path=f"{LAYER}mlp.{name}_proj.{kind}", role=f"mlp.{name}{suffix}", group="mlp")
            for name in ("gate", "up", "down")
            for kind, suffix in (("weight", ""), ("bias", ".bias"))
        ),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta attention_bias mlp_bias head_dim pretraining_tp
        """.split()
    ),
)
