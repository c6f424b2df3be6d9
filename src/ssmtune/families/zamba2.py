"""Zamba2 (`zamba2`): Mamba-2 in every layer, in some behind a transformer block that several layers share.

Layers that share a block hold the same tensors; what tells them apart is a built-in low-rank pair per layer beside the
block's projections, and a projection of the block's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.component import Group
from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families._transformer import EMBEDDINGS, LAYER, linear, prepare_packed_hybrid
from ssmtune.families.base import Claim, Family

SHARED = LAYER + "shared_transformer."


def _sizes(config: Any) -> Sizes:
    return Sizes(
        inner=int(config.mamba_expand * config.hidden_size),
        states=config.mamba_ngroups * config.mamba_d_state,
        heads=config.n_mamba_heads,
    )


def _gate_up_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return (("mlp.gate", config.intermediate_size), ("mlp.up", config.intermediate_size))


def _pair_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return tuple((f"{role}.pair.up", num_rows) for role, num_rows in _gate_up_rows(config))


def _pair(name: str, role: str, group: Group, rows: Any = None) -> tuple[Claim, ...]:
    """Claims of a built-in low-rank pair: down to `adapter_rank`, and up to the projection's width."""
    return (
        Claim(path=f"{SHARED}{name}.{{block}}.0.weight", role=f"{role}.pair.down", group=group),
        Claim(path=f"{SHARED}{name}.{{block}}.1.weight", role=f"{role}.pair.up", group=group, rows=rows),
    )


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Zamba2Config

    make = partial(
        Zamba2Config,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=20,
        num_attention_heads=4,
        n_mamba_heads=8,
        mamba_d_state=16,
        chunk_size=16,
        adapter_rank=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "shared": make(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
        "two-blocks": make(
            num_hidden_layers=3,
            layers_block_type=["hybrid", "hybrid", "hybrid"],
            num_mem_blocks=2,
            use_shared_attention_adapter=True,
            use_mem_rope=True,
        ),
        "odd": make(
            num_hidden_layers=2,
            layers_block_type=["linear_attention", "hybrid"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            n_mamba_heads=6,
            mamba_ngroups=2,
            mamba_d_state=5,
            mamba_d_conv=3,
            add_bias_linear=True,
            time_step_min=0.05,
            tie_word_embeddings=False,
        ),
    }


FAMILY = Family(
    model_types=("zamba2",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("Zamba2MambaMixer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    state_size="mamba_d_state",
    entry_rows=entry_rows,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    # Shared by several layers; its attention reads twice the width that it writes.
    blocks={"block.mlp": SHARED + "feed_forward", "block.attention": ""},
    claims=(
        *EMBEDDINGS,
        Claim(path="model.final_layernorm.weight", role="norm.final", group="norm"),
        # A layer is a mixer, or holds one beside the shared block.
        *(
            claim
            for layer in (LAYER, LAYER + "mamba_decoder.")
            for claim in (
                Claim(path=layer + "input_layernorm.weight", role="norm.mixer", group="norm"),
                *mixer_claims(layer + "mamba", _sizes),
            )
        ),
        *linear(LAYER + "linear", "shared.out", "mlp"),
        Claim(path=SHARED + "input_layernorm.weight", role="norm.attn", group="norm"),
        Claim(path=SHARED + "pre_ff_layernorm.weight", role="norm.mlp", group="norm"),
        *(claim for part in "qkvo" for claim in linear(f"{SHARED}self_attn.{part}_proj", f"attn.{part}", "attention")),
        *(
            claim
            for part in "qkv"
            for claim in _pair(f"self_attn.linear_{part}_adapter_list", f"attn.{part}", "attention")
        ),
        Claim(path=SHARED + "feed_forward.gate_up_proj.weight", role="mlp.in", group="mlp", rows=_gate_up_rows),
        Claim(path=SHARED + "feed_forward.gate_up_proj.bias", role="mlp.in.bias", group="mlp", rows=_gate_up_rows),
        *linear(SHARED + "feed_forward.down_proj", "mlp.out", "mlp"),
        *_pair("feed_forward.gate_up_proj_adapter_list", "mlp.in", "mlp", _pair_rows),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta num_logits_to_keep layers_block_type layer_types
        n_mamba_heads mamba_ngroups mamba_d_state mamba_d_conv mamba_expand chunk_size add_bias_linear time_step_min
        num_mem_blocks use_shared_attention_adapter adapter_rank use_mem_rope use_long_context
        """.split()
        # Computed from the others by the config itself.
        + "attention_hidden_size attention_head_dim head_dim mamba_headdim kv_channels num_query_groups".split()
        + "hybrid_layer_ids".split()
        # Only for the first values of the weights.
        + "time_step_max time_step_floor".split()
        # In published configs, and read by no layer of transformers: the convolution always has its bias, the shared MLP
        # always its pairs, and dt is limited by time_step_min alone.
        + "use_conv_bias use_mamba_kernels use_mem_eff_path time_step_limit sliding_window state_size".split()
        + ["ffn_hidden_size", "use_shared_mlp_adapter"]
    ),
)
