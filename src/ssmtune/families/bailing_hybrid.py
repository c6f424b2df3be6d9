"""Ling 3 (`bailing_hybrid`): Kimi Delta Attention or latent attention with a gate per head, then experts or an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._gated_delta import entry_rows, kda_operations, kda_states, projections
from ssmtune.families._kimi_delta import CLAIMS, HANDLED_CONFIG, MIXER
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import BailingHybridConfig

    make = partial(
        BailingHybridConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=6,
        v_head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "moe": make(layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"]),
        "unbounded-gate": make(
            layer_types=["full_attention", "linear_attention"],
            mlp_layer_types=["sparse", "sparse"],
            num_local_experts=6,
            n_group=3,
            topk_group=2,
            n_shared_experts=2,
            kda_safe_gate=False,
            attention_bias=True,
            num_mtp_layers=1,
        ),
        "odd": make(
            hidden_size=24,
            layer_types=["linear_attention", "full_attention"],
            mlp_layer_types=["dense", "dense"],
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=5,
            short_conv_kernel_size=3,
            kda_lower_bound=-2.0,
            # Heads of width 5 can come out nearly zero, and a norm without this would make their rounding large.
            rms_norm_eps=1e-3,
        ),
    }


FAMILY = Family(
    model_types=("bailing_hybrid",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("BailingHybridDeltaAttention",),
    operations=kda_operations,
    states=kda_states,
    entry_rows=entry_rows(["q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_proj"]),
    prepare_packed=prepare_packed_hybrid,
    decay_bound=lambda config: config.kda_lower_bound if config.kda_safe_gate else None,
    tiny_configs=_tiny_configs,
    claims=(
        *CLAIMS,
        *projections(MIXER + "forget_gate.", {"f_proj": "gdn.in.a"}, "recurrent"),
        # The gate of the output: per channel in recurrent layers, per head in attention.
        *projections(MIXER, {"g_proj": "gdn.in.z"}, "recurrent", layer_type="linear_attention"),
        *projections(MIXER, {"g_proj": "attn.gate"}, "attention", layer_type="full_attention"),
    ),
    handled_config=HANDLED_CONFIG
    | {"rope_parameters", "rope_theta", "short_conv_kernel_size", "layer_group_size", "kda_safe_gate"}
    | {"kda_lower_bound", "mtp_loss_scaling_factor"},
)
