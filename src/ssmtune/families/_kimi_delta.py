"""What Kimi Linear and Ling share: KDA or latent attention (MLA) under the same names, then an MLP or experts."""

from __future__ import annotations

from typing import Any

from ssmtune.families._gated_delta import embeddings, experts, mlp, norms, projections, recurrence
from ssmtune.families.base import Claim

LAYER = "model.layers.{layer}."
MIXER = LAYER + "self_attn."

HANDLED_CONFIG = frozenset(
    """
    vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads num_shared_experts output_router_logits routed_scaling_factor kv_lora_rank qk_rope_head_dim
    v_head_dim qk_nope_head_dim qk_head_dim head_dim num_expert_group topk_group num_experts_per_token moe_renormalize
    hidden_act rms_norm_eps pretraining_tp attention_bias num_experts mlp_layer_types first_k_dense_replace layer_types
    linear_head_dim linear_num_heads linear_conv_kernel_dim model_max_length num_nextn_predict_layers
    """.split()
)
"""transformers builds none of the `num_nextn_predict_layers`, which predict further tokens."""


def _conv_rows(config: Any) -> tuple[tuple[str, int], ...]:
    width = config.linear_num_heads * config.linear_head_dim
    return tuple((f"gdn.conv.{part}", width) for part in "qkv")


def _kv_down_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """The latent of keys and values, then the part of the key that all heads share."""
    return (("attn.kv.latent", config.kv_lora_rank), ("attn.k.shared", config.qk_rope_head_dim))


def _kv_up_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """For every head its part of the key, then its value."""
    num_heads: int = config.num_attention_heads
    return (("attn.k", config.qk_nope_head_dim), ("attn.v", config.v_head_dim)) * num_heads


CLAIMS = (
    *embeddings("model"),
    *norms(LAYER, {"input_layernorm": "norm.mixer", "post_attention_layernorm": "norm.mlp"}),
    *projections(MIXER, {"q_proj": "attn.q", "o_proj": "attn.o"}, "attention", layer_type="full_attention"),
    *(
        Claim(path=f"{MIXER}kv_a_proj_with_mqa.{kind}", role=role, group="attention", rows=_kv_down_rows)
        for kind, role in (("weight", "attn.kv.down"), ("bias", "attn.kv.down.bias"))
    ),
    *norms(MIXER, {"kv_a_layernorm": "norm.kv"}),
    Claim(path=MIXER + "kv_b_proj.weight", role="attn.kv.up", group="attention", rows=_kv_up_rows),
    *projections(
        MIXER,
        {**{f"{name}_proj": f"gdn.in.{name}" for name in "qkvb"}, "o_proj": "gdn.out"},
        "recurrent",
        layer_type="linear_attention",
    ),
    *recurrence(MIXER, _conv_rows, gate="forget_gate."),
    Claim(path=MIXER + "o_norm.weight", role="gdn.norm", group="norm"),
    *mlp(LAYER + "mlp."),
    *experts(LAYER + "mlp.", "shared_experts"),
)
"""Claims of all tensors but those of the gates, whose shapes differ between the two."""
