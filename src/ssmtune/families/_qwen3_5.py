"""What Qwen3.5's language model and the multimodal class around it share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmtune.families._gated_delta import entry_rows
from ssmtune.families._qwen3 import part_rows, tiny

RECURRENT_CLASSES = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")


def _qkv_rows(config: Any) -> tuple[tuple[str, int], ...]:
    rows = part_rows(config)
    return tuple((f"gdn.in.{part}", rows[part]) for part in "qkv")


IN_PROJECTIONS = {
    "in_proj_qkv": ("gdn.in", _qkv_rows),
    "in_proj_z": ("gdn.in.z", None),
    "in_proj_b": ("gdn.in.b", None),
    "in_proj_a": ("gdn.in.a", None),
}


ENTRY_ROWS = entry_rows(["in_proj_qkv", "in_proj_b", "in_proj_a"])


ODD_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    # Over so few channels an output is now and then near zero, and 1e-6 lets the norm multiply its rounding.
    "rms_norm_eps": 1e-3,
    "linear_conv_kernel_dim": 3,
    "attention_bias": True,
}
"""What the tiny config with odd sizes sets beside its layers."""


def text_configs() -> Mapping[str, Any]:
    """Tiny configs of the language model, by name."""
    from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

    dense = tiny(Qwen3_5TextConfig, intermediate_size=40)
    experts = tiny(
        Qwen3_5MoeTextConfig,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return {
        "dense": dense(
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            tie_word_embeddings=True,
        ),
        "odd": dense(
            num_hidden_layers=2,
            layer_types=["full_attention", "linear_attention"],
            **ODD_SIZES,
        ),
        "moe": experts(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    }
