"""Bamba (`bamba`): Mamba-2 or attention in each layer, then an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families._transformer import ATTENTION, EMBEDDINGS, LAYER, linear, prepare_packed_hybrid
from ssmtune.families.base import Claim, Family


def _sizes(config: Any) -> Sizes:
    return Sizes(
        inner=int(config.mamba_expand * config.hidden_size),
        states=config.mamba_n_groups * config.mamba_d_state,
        heads=config.mamba_n_heads,
    )


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import BambaConfig

    make = partial(
        BambaConfig,
        vocab_size=97,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_state=16,
        mamba_chunk_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "tied": make(num_hidden_layers=3, tie_word_embeddings=True, z_loss_coefficient=0.1),
        "odd": make(
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=12,
            attn_layer_indices=[0],
            mamba_n_heads=6,
            mamba_n_groups=2,
            mamba_d_state=5,
            mamba_proj_bias=True,
            attention_bias=True,
            mlp_bias=True,
            time_step_limit=(0.001, 5.0),
        ),
        "no-conv-bias": make(mamba_conv_bias=False, mamba_d_conv=2),
    }


FAMILY = Family(
    model_types=("bamba",),
    topology="sequential",
    backbone="model",
    counts_on=False,
    recurrent_classes=("BambaMixer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    state_size="mamba_d_state",
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
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta partial_rotary_factor attention_bias mlp_bias
        num_logits_to_keep attn_layer_indices layers_block_type layer_types z_loss_coefficient mamba_n_heads
        mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
        mamba_proj_bias time_step_limit
        """.split()
        # In published configs, and read by no layer of transformers, which rotates half of each head.
        + ["attn_rotary_emb", "use_mamba_kernels"]
    ),
)
