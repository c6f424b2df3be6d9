"""Granite 4 hybrids (`granitemoehybrid`): Mamba-2 or attention in each layer, then an MLP, optionally with experts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families._transformer import ATTENTION, EMBEDDINGS, LAYER, prepare_packed_hybrid
from ssmtune.families.base import Claim, Family


def _sizes(config: Any) -> Sizes:
    return Sizes(
        inner=int(config.mamba_expand * config.hidden_size),
        states=config.mamba_n_groups * config.mamba_d_state,
        heads=config.mamba_n_heads,
    )


def _gate_up_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return (("mlp.gate", config.shared_intermediate_size), ("mlp.up", config.shared_intermediate_size))


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import GraniteMoeHybridConfig

    make = partial(
        GraniteMoeHybridConfig,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        shared_intermediate_size=24,
        intermediate_size=20,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_chunk_size=16,
        embedding_multiplier=2.0,
        attention_multiplier=0.125,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"]),
        "moe": make(
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        "odd": make(
            num_hidden_layers=2,
            layer_types=["full_attention", "linear_attention"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            mamba_n_heads=6,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_state=5,
            mamba_proj_bias=True,
            attention_bias=True,
            time_step_limit=(0.001, 5.0),
            position_embedding_type="rope",
        ),
        "no-conv-bias": make(
            num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], mamba_conv_bias=False
        ),
    }


FAMILY = Family(
    model_types=("granitemoehybrid",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("GraniteMoeHybridMambaLayer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    state_size="mamba_d_state",
    entry_rows=entry_rows,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    # The experts are a second module whose output is added to this one's.
    blocks={"block.mlp": LAYER + "shared_mlp"},
    claims=(
        *EMBEDDINGS,
        Claim(path="model.norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "post_attention_layernorm.weight", role="norm.mlp", group="norm"),
        *ATTENTION,
        *mixer_claims(LAYER + "mamba", _sizes),
        Claim(path=LAYER + "shared_mlp.input_linear.weight", role="mlp.in", group="mlp", rows=_gate_up_rows),
        Claim(path=LAYER + "shared_mlp.output_linear.weight", role="mlp.out", group="mlp"),
        Claim(path=LAYER + "block_sparse_moe.router.weight", role="moe.router", group="mlp"),
        Claim(
            path=LAYER + "block_sparse_moe.experts.gate_up_proj", role="moe.experts.in", group="mlp", access="parameter"
        ),
        Claim(
            path=LAYER + "block_sparse_moe.experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"
        ),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta attention_bias embedding_multiplier logits_scaling
        residual_multiplier attention_multiplier num_local_experts num_experts_per_tok output_router_logits
        router_aux_loss_coef shared_intermediate_size position_embedding_type layer_types layers_block_type mamba_n_heads
        mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
        mamba_proj_bias time_step_limit
        """.split()
    ),
)
