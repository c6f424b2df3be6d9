"""RecurrentGemma (`recurrent_gemma`): real-gated linear recurrent units (RG-LRU) and attention within a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._griffin_block import griffin_methods
from ssmtune.families._transformer import EMBEDDINGS, LAYER, linear, packed_mask
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

MIXER = LAYER + "temporal_block."
UNIT = MIXER + "rg_lru."


def _prepare_packed(model: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    mask = packed_mask(model.get_submodule("model"), position_ids, sliding=True)
    return {"attention_mask": {"sliding_attention": mask}, "seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import RecurrentGemmaConfig

    make = partial(
        RecurrentGemmaConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_hidden_layers=2,
        block_types=["recurrent", "attention"],
        attention_window_size=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"]),
        "wide": make(lru_width=48, conv1d_width=3, attention_bias=True, tie_word_embeddings=False),
        "odd": make(
            block_types=["attention", "recurrent"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=3,
            conv1d_width=2,
            logits_soft_cap=3.0,
            hidden_activation="silu",
        ),
    }


FAMILY = Family(
    model_types=("recurrent_gemma",),
    topology="sequential",
    # The model itself: it makes the cache, and a row with a cache would be taken for a continuation further in.
    backbone="",
    recurrent_classes=("RecurrentGemmaForCausalLM", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaRglru"),
    methods=griffin_methods,
    takes_prompt=False,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.final_norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "temporal_pre_norm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "channel_pre_norm.weight", role="norm.mlp", group="norm"),
        *(claim for part in "qkvo" for claim in linear(f"{MIXER}{part}_proj", f"attn.{part}", "attention")),
        *linear(MIXER + "linear_x", "lru.in.x", "recurrent"),
        *linear(MIXER + "linear_y", "lru.in.gate", "recurrent"),
        *linear(MIXER + "linear_out", "lru.out", "recurrent"),
        Claim(path=MIXER + "conv_1d.weight", role="lru.conv", group="conv", access="parameter"),
        Claim(path=MIXER + "conv_1d.bias", role="lru.conv.bias", group="conv", access="parameter"),
        Claim(path=UNIT + "recurrent_param", role="lru.Lambda", group="core", access="parameter"),
        # The step-size bias of other layers: it sets how fast a channel forgets.
        Claim(path=UNIT + "recurrent_gate_bias", role="lru.recurrent_gate_bias", group="core", access="parameter"),
        Claim(path=UNIT + "recurrent_gate_weight", role="lru.recurrent_gate", group="recurrent", access="parameter"),
        Claim(path=UNIT + "input_gate_weight", role="lru.input_gate", group="recurrent", access="parameter"),
        Claim(path=UNIT + "input_gate_bias", role="lru.input_gate.bias", group="recurrent", access="parameter"),
        *(
            claim
            for part in ("gate", "up", "down")
            for claim in linear(f"{LAYER}mlp_block.{part}_proj", f"mlp.{part}", "mlp")
        ),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        lru_width attention_window_size conv1d_width logits_soft_cap rms_norm_eps hidden_activation rope_parameters
        rope_theta partial_rotary_factor block_types attention_bias tie_word_embeddings w_init_variance_scale
        final_w_init_variance_scale
        """.split()
        # In published configs, and read by no layer of transformers, which always scales the embeddings.
        + ["embeddings_scale_by_sqrt_dim"]
    ),
)
