"""LFM2 (`lfm2`, `lfm2_moe`): a gated short convolution or attention in each layer, then an MLP, or experts in its place.

The convolution is the whole mixer: its state is the last few inputs, and there is no decay, so no core.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._convolution import convolution_operations
from ssmtune.families._transformer import EMBEDDINGS, LAYER, linear, packed_mask
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn


def _in_proj_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """Rows of `in_proj` in order: the gate B before the convolution, the gate C after it, and its input x."""
    return tuple((f"conv.in.{part}", config.hidden_size) for part in ("B", "C", "x"))


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    masks = {"full_attention": packed_mask(backbone, position_ids), "conv": None}
    return {"attention_mask": masks, "seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Lfm2Config, Lfm2MoeConfig

    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
    }
    make = partial(Lfm2Config, **sizes)
    return {
        "dense": make(block_multiple_of=8),
        "biases": make(
            conv_bias=True,
            conv_L_cache=4,
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=False,
        ),
        "moe": Lfm2MoeConfig(
            **sizes
            | {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]}
            | {"num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        ),
    }


FAMILY = Family(
    model_types=("lfm2", "lfm2_moe"),
    topology="sequential",
    backbone="model",
    recurrent_classes=("Lfm2ShortConv", "Lfm2MoeShortConv"),
    operations=convolution_operations,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.embedding_norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "operator_norm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "ffn_norm.weight", role="norm.mlp", group="norm"),
        *(
            claim
            for name, part in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o"))
            for claim in linear(f"{LAYER}self_attn.{name}", f"attn.{part}", "attention")
        ),
        Claim(path=LAYER + "self_attn.q_layernorm.weight", role="norm.q", group="norm"),
        Claim(path=LAYER + "self_attn.k_layernorm.weight", role="norm.k", group="norm"),
        Claim(path=LAYER + "conv.in_proj.weight", role="conv.in", group="recurrent", rows=_in_proj_rows),
        Claim(path=LAYER + "conv.in_proj.bias", role="conv.in.bias", group="recurrent", rows=_in_proj_rows),
        Claim(path=LAYER + "conv.conv.weight", role="conv", group="conv", access="parameter"),
        Claim(path=LAYER + "conv.conv.bias", role="conv.bias", group="conv", access="parameter"),
        *linear(LAYER + "conv.out_proj", "conv.out", "recurrent"),
        Claim(path=LAYER + "feed_forward.w1.weight", role="mlp.gate", group="mlp"),
        Claim(path=LAYER + "feed_forward.w3.weight", role="mlp.up", group="mlp"),
        Claim(path=LAYER + "feed_forward.w2.weight", role="mlp.down", group="mlp"),
        Claim(path=LAYER + "feed_forward.gate.weight", role="moe.router", group="mlp"),
        Claim(path=LAYER + "feed_forward.experts.gate_up_proj", role="moe.experts.in", group="mlp", access="parameter"),
        Claim(path=LAYER + "feed_forward.experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads norm_eps
        tie_word_embeddings rope_parameters rope_theta layer_types full_attn_idxs conv_bias conv_L_cache block_multiple_of
        block_ffn_dim_multiplier block_auto_adjust_ff_dim moe_intermediate_size num_dense_layers num_experts
        num_experts_per_tok use_expert_bias routed_scaling_factor norm_topk_prob output_router_logits
        """.split()
        # In published configs, and read by no layer of transformers: sizes and settings that others repeat or fix.
        + "block_dim block_norm_eps block_use_swiglu block_mlp_init_scale block_out_init_scale".split()
        + "block_use_xavier_init conv_dim conv_dim_out conv_use_xavier_init num_heads use_pos_enc theta model_name".split()
    ),
)
