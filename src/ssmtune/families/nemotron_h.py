"""Nemotron-H (`nemotron_h`): each layer is one of Mamba-2, attention, an MLP, or experts beside a shared one; none is gated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families._transformer import linear, prepare_packed_hybrid
from ssmtune.families.base import Claim, Family

LAYER = "model.layers.{layer}."
MIXER = LAYER + "mixer"


def _sizes(config: Any) -> Sizes:
    return Sizes(
        inner=config.mamba_num_heads * config.mamba_head_dim,
        states=config.n_groups * config.ssm_state_size,
        heads=config.mamba_num_heads,
    )


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import NemotronHConfig

    make = partial(
        NemotronHConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"], mlp_bias=True),
        "moe": make(
            layers_block_type=["linear_attention", "moe", "full_attention"],
            moe_latent_size=16,
            n_routed_experts=8,
            n_group=2,
            routed_scaling_factor=2.5,
            mlp_bias=True,
        ),
        "odd": make(
            layers_block_type=["full_attention", "moe", "linear_attention"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            mamba_num_heads=6,
            ssm_state_size=5,
            n_groups=2,
            conv_kernel=3,
            use_bias=True,
            use_conv_bias=False,
            norm_topk_prob=False,
            time_step_min=0.05,
        ),
    }


FAMILY = Family(
    model_types=("nemotron_h",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("NemotronHMamba2Mixer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    state_size="ssm_state_size",
    entry_rows=entry_rows,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="model.embeddings.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        Claim(path="model.norm_f.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "norm.weight", role="norm.mixer", group="norm"),
        *mixer_claims(MIXER, _sizes),
        *(claim for part in "qkvo" for claim in linear(f"{MIXER}.{part}_proj", f"attn.{part}", "attention")),
        *linear(f"{MIXER}.up_proj", "mlp.up", "mlp"),
        *linear(f"{MIXER}.down_proj", "mlp.down", "mlp"),
        Claim(path=f"{MIXER}.gate.weight", role="moe.router", group="mlp"),
        Claim(path=f"{MIXER}.experts.up_proj", role="moe.experts.up", group="mlp", access="parameter"),
        Claim(path=f"{MIXER}.experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"),
        *linear(f"{MIXER}.shared_experts.up_proj", "moe.shared.up", "mlp"),
        *linear(f"{MIXER}.shared_experts.down_proj", "moe.shared.down", "mlp"),
        *linear(f"{MIXER}.fc1_latent_proj", "moe.latent.in", "mlp"),
        *linear(f"{MIXER}.fc2_latent_proj", "moe.latent.out", "mlp"),
    ),
    # Not mamba_hidden_act: the convolution's activation is SiLU.
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
        layer_norm_epsilon tie_word_embeddings num_logits_to_keep layers_block_type layer_types mlp_hidden_act mlp_bias
        mamba_num_heads mamba_head_dim ssm_state_size n_groups conv_kernel chunk_size use_bias use_conv_bias
        time_step_min n_routed_experts num_local_experts moe_intermediate_size moe_shared_expert_intermediate_size
        moe_latent_size num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob
        """.split()
        # Only for the first values of the weights.
        + "time_step_max time_step_floor rescale_prenorm_residual".split()
        # In published configs, and read by no layer of transformers: dt is limited by time_step_min alone, attention has
        # no bias and no rotation, there is one shared expert, states are fp32, and no layer predicts further tokens.
        + "time_step_limit attention_bias mamba_proj_bias expand n_shared_experts moe_shared_expert_overlap".split()
        + "residual_in_fp32 hidden_dropout use_mamba_kernels mamba_ssm_cache_dtype output_router_logits".split()
        + "num_nextn_predict_layers mtp_layers_block_type sliding_window attention_head_dim time_step_rank".split()
        + "rms_norm_eps norm_eps rope_theta rope_parameters partial_rotary_factor".split()
    ),
)
