"""Kimi Linear (`kimi_linear`): Kimi Delta Attention or latent attention without positions, then experts or an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._gated_delta import entry_rows, kda_operations, kda_states, norms, projections
from ssmtune.families._kimi_delta import CLAIMS, HANDLED_CONFIG, MIXER
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import KimiLinearConfig

    make = partial(
        KimiLinearConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        linear_head_dim=8,
        linear_num_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "moe": make(layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"]),
        "grouped-experts": make(
            layer_types=["full_attention", "linear_attention"],
            mlp_layer_types=["sparse", "sparse"],
            num_local_experts=6,
            n_group=3,
            topk_group=2,
            n_shared_experts=2,
            norm_topk_prob=False,
            q_lora_rank=9,
            attention_bias=True,
        ),
        "odd": make(
            hidden_size=24,
            num_hidden_layers=3,
            layer_types=["full_attention", "linear_attention", "full_attention"],
            mlp_layer_types=["dense", "dense", "dense"],
            num_attention_heads=3,
            num_key_value_heads=3,
            linear_num_heads=3,
            linear_head_dim=5,
            linear_conv_kernel_dim=3,
        ),
    }


FAMILY = Family(
    model_types=("kimi_linear",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("KimiLinearDeltaAttention",),
    operations=kda_operations,
    states=kda_states,
    entry_rows=entry_rows(["q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_b_proj"]),
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=(
        *CLAIMS,
        # The decay and the gate of the output come through a bottleneck, as can the queries of attention.
        *projections(MIXER + "forget_gate.", {"f_a_proj": "gdn.in.a.down", "f_b_proj": "gdn.in.a.up"}, "recurrent"),
        *projections(MIXER, {"g_a_proj": "gdn.in.z.down", "g_b_proj": "gdn.in.z.up"}, "recurrent"),
        *projections(MIXER, {"q_a_proj": "attn.q.down", "q_b_proj": "attn.q.up"}, "attention"),
        *norms(MIXER, {"q_a_layernorm": "norm.q"}),
    ),
    handled_config=HANDLED_CONFIG
    | {"q_lora_rank"}
    # In published configs: `linear_attn_config` is read into the attributes above, the others by no layer.
    | {"linear_attn_config", "mla_use_nope", "moe_layer_freq", "moe_router_activation_func", "use_grouped_topk"}
    | {"rope_theta", "rope_scaling", "rope_parameters"},
)
