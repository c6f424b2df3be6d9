"""OLMo Hybrid (`olmo_hybrid`): Gated DeltaNet with a projection each for q, k, v, a, b and the gate, or attention; an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._gated_delta import (
    deltanet_operations,
    deltanet_states,
    embeddings,
    entry_rows,
    mlp,
    norms,
    projections,
    recurrence,
)
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Claim, Family

LAYER = "model.layers.{layer}."
MIXER = LAYER + "linear_attn."


def _conv_rows(config: Any) -> tuple[tuple[str, int], ...]:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return (("gdn.conv.q", keys), ("gdn.conv.k", keys), ("gdn.conv.v", values))


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import OlmoHybridConfig

    make = partial(
        OlmoHybridConfig,
        vocab_size=97,
        num_hidden_layers=2,
        intermediate_size=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "no-rope": make(hidden_size=32, num_attention_heads=4, layer_types=["linear_attention", "full_attention"]),
        "rope": make(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["full_attention", "linear_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            linear_allow_neg_eigval=False,
            tie_word_embeddings=True,
        ),
        "odd": make(
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=3,
            linear_key_head_dim=5,
            linear_value_head_dim=7,
            linear_conv_kernel_dim=3,
            attention_bias=True,
        ),
    }


FAMILY = Family(
    model_types=("olmo_hybrid",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("OlmoHybridGatedDeltaNet",),
    operations=deltanet_operations,
    states=deltanet_states,
    entry_rows=entry_rows([f"{name}_proj" for name in "qkvba"]),
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=(
        *embeddings("model"),
        # Recurrent layers normalise what enters the mixer and the MLP, attention layers what leaves them.
        *norms(
            LAYER,
            {"input_layernorm": "norm.mixer", "post_attention_layernorm": "norm.mlp"},
            layer_type="linear_attention",
        ),
        *norms(
            LAYER,
            {"post_attention_layernorm": "norm.mixer", "post_feedforward_layernorm": "norm.mlp"},
            layer_type="full_attention",
        ),
        *norms(LAYER + "self_attn.", {"q_norm": "norm.q", "k_norm": "norm.k"}),
        *projections(LAYER + "self_attn.", {f"{name}_proj": f"attn.{name}" for name in "qkvo"}, "attention"),
        *projections(MIXER, {f"{name}_proj": f"gdn.in.{name}" for name in "qkvba"}, "recurrent"),
        *projections(MIXER, {"g_proj": "gdn.in.z", "o_proj": "gdn.out"}, "recurrent"),
        *recurrence(MIXER, _conv_rows),
        Claim(path=MIXER + "o_norm.weight", role="gdn.norm", group="norm"),
        *mlp(LAYER + "mlp."),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta attention_bias head_dim layer_types
        linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
        linear_allow_neg_eigval linear_a_log_min linear_a_log_max linear_dt_min linear_dt_max linear_dt_init_floor
        """.split()
    ),
)
