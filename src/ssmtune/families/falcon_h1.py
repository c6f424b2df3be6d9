"""Falcon-H1 (`falcon_h1`): Mamba-2 and attention side by side in every layer, then an MLP, scaled by fixed multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families._transformer import ATTENTION, EMBEDDINGS, LAYER, linear, prepare_packed_hybrid
from ssmtune.families.base import Claim, Family


def _sizes(config: Any) -> Sizes:
    inner = config.mamba_d_ssm
    return Sizes(
        inner=int(config.mamba_expand * config.hidden_size) if inner is None else inner,
        states=config.mamba_n_groups * config.mamba_d_state,
        heads=config.mamba_n_heads,
    )


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import FalconH1Config

    make = partial(
        FalconH1Config,
        vocab_size=97,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_d_ssm=48,
        mamba_n_heads=6,
        mamba_d_state=16,
        mamba_chunk_size=16,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        key_multiplier=0.8,
        attention_in_multiplier=1.2,
        attention_out_multiplier=0.7,
        ssm_in_multiplier=1.3,
        ssm_out_multiplier=0.6,
        ssm_multipliers=[0.7, 1.2, 0.8, 1.1, 0.9],
        mlp_multipliers=[0.9, 0.6],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "no-norm": make(tie_word_embeddings=True),
        "norm-first": make(mamba_rms_norm=True, mamba_n_groups=2, mamba_conv_bias=False),
        "odd": make(
            num_hidden_layers=1,
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=10,
            mamba_d_ssm=None,
            mamba_n_groups=2,
            mamba_d_state=5,
            mamba_rms_norm=True,
            mamba_norm_before_gate=False,
            mamba_proj_bias=True,
            projectors_bias=True,
            attention_bias=True,
            mlp_bias=True,
            time_step_limit=(0.001, 5.0),
        ),
    }


FAMILY = Family(
    model_types=("falcon_h1",),
    topology="parallel",
    backbone="model",
    recurrent_classes=("FalconH1Mixer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    entry_rows=entry_rows,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.final_layernorm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "pre_ff_layernorm.weight", role="norm.mlp", group="norm"),
        *ATTENTION,
        *mixer_claims(LAYER + "mamba", _sizes),
        *(
            claim
            for part in ("gate", "up", "down")
            for claim in linear(f"{LAYER}feed_forward.{part}_proj", f"mlp.{part}", "mlp")
        ),
    ),
    # Not hidden_act: it is the convolution's activation too, and that is SiLU.
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta attention_bias mlp_bias projectors_bias
        num_logits_to_keep layers_block_type layer_types lm_head_multiplier embedding_multiplier mlp_multipliers
        key_multiplier attention_out_multiplier attention_in_multiplier ssm_multipliers ssm_in_multiplier
        ssm_out_multiplier mamba_d_ssm mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand
        mamba_chunk_size mamba_conv_bias mamba_proj_bias mamba_norm_before_gate mamba_rms_norm time_step_limit
        """.split()
        # In published configs, and read by no layer of transformers: every layer has attention and an MLP.
        + "attn_layer_indices mamba_use_mlp mlp_expansion_factor".split()
        + "time_step_rank time_step_min time_step_max time_step_floor".split()
    ),
)
