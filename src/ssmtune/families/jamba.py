"""Jamba (`jamba`): Mamba-1 with norms on dt, B and C, or attention in each layer, then an MLP or experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families import _mamba1
from ssmtune.families._transformer import ATTENTION, EMBEDDINGS, LAYER, linear, packed_mask
from ssmtune.families.base import Claim, Family
from ssmtune.packing import mark_documents

if TYPE_CHECKING:
    import torch
    from torch import nn


def _in_proj_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return _mamba1.in_proj_rows(config.mamba_expand * config.hidden_size)


def _x_proj_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return _mamba1.x_proj_rows(config.mamba_dt_rank, config.mamba_d_state)


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """The recurrent layers are given the mask and nothing else."""
    return {
        "attention_mask": {
            "full_attention": packed_mask(backbone, position_ids),
            "linear_attention": mark_documents(seq_idx),
        }
    }


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import JambaConfig

    make = partial(
        JambaConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(),
        "moe": make(num_experts=4, num_experts_per_tok=2),
        "odd": make(
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            attn_layer_offset=0,
            mamba_d_state=5,
            mamba_d_conv=3,
            mamba_expand=3,
            mamba_dt_rank=5,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            tie_word_embeddings=True,
        ),
    }


FAMILY = Family(
    model_types=("jamba",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("JambaMambaMixer",),
    operations=_mamba1.operations,
    states=_mamba1.states,
    entry_rows=_mamba1.entry_rows,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.final_layernorm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "pre_ff_layernorm.weight", role="norm.mlp", group="norm"),
        *ATTENTION,
        *_mamba1.mixer_claims(LAYER + "mamba.", in_rows=_in_proj_rows, x_rows=_x_proj_rows),
        Claim(path=LAYER + "mamba.dt_layernorm.weight", role="ssm.norm.dt", group="norm"),
        Claim(path=LAYER + "mamba.b_layernorm.weight", role="ssm.norm.B", group="norm"),
        Claim(path=LAYER + "mamba.c_layernorm.weight", role="ssm.norm.C", group="norm"),
        *(
            claim
            for part in ("gate", "up", "down")
            for claim in linear(f"{LAYER}feed_forward.{part}_proj", f"mlp.{part}", "mlp")
        ),
        Claim(path=LAYER + "feed_forward.router.weight", role="moe.router", group="mlp"),
        Claim(path=LAYER + "feed_forward.experts.gate_up_proj", role="moe.experts.in", group="mlp", access="parameter"),
        Claim(path=LAYER + "feed_forward.experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps
        tie_word_embeddings output_router_logits router_aux_loss_coef num_experts num_experts_per_tok expert_layer_period
        expert_layer_offset attn_layer_period attn_layer_offset mamba_d_state mamba_d_conv mamba_expand mamba_dt_rank
        mamba_conv_bias mamba_proj_bias use_mamba_kernels use_mambapy use_associative_scan
        """.split()
        # Left in published checkpoints by earlier versions; transformers reads neither.
        + "num_logits_to_keep sliding_window".split()
    ),
)
