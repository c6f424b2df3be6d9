"""What Qwen3-Next and Qwen3.5 share: everything but the layout of the recurrent layers' input projections."""

from __future__ import annotations

from functools import partial
from typing import Any

from ssmtune.families._gated_delta import embeddings, experts, mlp, norms, projections, recurrence
from ssmtune.families.base import Claim

HANDLED_CONFIG = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
    rms_norm_eps tie_word_embeddings rope_parameters rope_theta partial_rotary_factor attention_bias head_dim
    linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
    layer_types moe_intermediate_size shared_expert_intermediate_size num_experts_per_tok num_experts
    decoder_sparse_step mlp_only_layers norm_topk_prob output_router_logits router_aux_loss_coef
    """.split()
    # In published configs, and read by no layer of transformers: the attention's gate and the SiLU of the recurrent one
    # are always there, no layer predicts further tokens, and the states are fp32.
    + "attn_output_gate output_gate_type full_attention_interval mamba_ssm_dtype use_sliding_window".split()
    + "mtp_num_hidden_layers mtp_use_dedicated_embeddings".split()
)


def part_rows(config: Any) -> dict[str, int]:
    """Width of q, k, v and the gate z over all heads, and number of value heads, each of which has one b and one a."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return {
        "q": keys,
        "k": keys,
        "v": values,
        "z": values,
        "b": config.linear_num_value_heads,
        "a": config.linear_num_value_heads,
    }


def _conv_rows(config: Any) -> tuple[tuple[str, int], ...]:
    rows = part_rows(config)
    return tuple((f"gdn.conv.{part}", rows[part]) for part in "qkv")


def _query_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """The attention's q_proj holds, for every head, its query and then the gate of its output."""
    num_heads: int = config.num_attention_heads
    return (("attn.q.query", config.head_dim), ("attn.q.gate", config.head_dim)) * num_heads


def claims(backbone: str, in_projections: dict[str, Any]) -> tuple[Claim, ...]:
    """All claims; `in_projections` gives for each input projection of the recurrent layers its role and rows."""
    layer = f"{backbone}.layers.{{layer}}."
    mixer = f"{layer}linear_attn."
    return (
        *embeddings(backbone),
        *norms(layer, {"input_layernorm": "norm.mixer", "post_attention_layernorm": "norm.mlp"}),
        *norms(f"{layer}self_attn.", {"q_norm": "norm.q", "k_norm": "norm.k"}),
        Claim(path=f"{layer}self_attn.q_proj.weight", role="attn.q", group="attention", rows=_query_rows),
        Claim(path=f"{layer}self_attn.q_proj.bias", role="attn.q.bias", group="attention", rows=_query_rows),
        *projections(f"{layer}self_attn.", {f"{name}_proj": f"attn.{name}" for name in "kvo"}, "attention"),
        *(
            Claim(path=f"{mixer}{name}.weight", role=role, group="recurrent", rows=rows)
            for name, (role, rows) in in_projections.items()
        ),
        *recurrence(mixer, _conv_rows),
        Claim(path=f"{mixer}norm.weight", role="gdn.norm", group="norm"),
        Claim(path=f"{mixer}out_proj.weight", role="gdn.out", group="recurrent"),
        *mlp(f"{layer}mlp."),
        *experts(f"{layer}mlp.", "shared_expert"),
        # One number per token: like the router, nothing that a low-rank change suits.
        Claim(path=f"{layer}mlp.shared_expert_gate.weight", role="moe.shared.router", group="other"),
    )


def tiny(make: Any, **options: Any) -> Any:
    """A partial of the config class `make` with small sizes; one attention head of 4 rotates 2 of its 8 channels."""
    return partial(
        make,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
