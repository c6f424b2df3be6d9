"""Qwen3-Next (`qwen3_next`): Gated DeltaNet or gated attention in each layer, then experts beside a shared one, or an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.families._gated_delta import deltanet_operations, deltanet_states
from ssmtune.families._qwen3 import HANDLED_CONFIG, claims, part_rows, tiny
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Family

if TYPE_CHECKING:
    from torch import nn


def _interleaved(*parts: str) -> Any:
    """Rows of `parts` one after the other for the first key head, then for the next, and so on."""

    def rows(config: Any) -> tuple[tuple[str, int], ...]:
        num_heads: int = config.linear_num_key_heads
        head = tuple((f"gdn.in.{part}", part_rows(config)[part] // num_heads) for part in parts)
        return head * num_heads

    return rows


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Qwen3NextConfig

    make = tiny(
        Qwen3NextConfig,
        intermediate_size=40,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return {
        "moe": make(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
        "mixed-mlp": make(
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            mlp_only_layers=[0],
            decoder_sparse_step=2,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
        "odd": make(
            num_hidden_layers=2,
            layer_types=["full_attention", "linear_attention"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            linear_num_key_heads=3,
            linear_num_value_heads=3,
            linear_key_head_dim=5,
            linear_value_head_dim=7,
            # Over so few channels an output is now and then near zero, and 1e-6 lets the norm multiply its rounding.
            rms_norm_eps=1e-3,
            linear_conv_kernel_dim=3,
            num_experts=0,
        ),
    }


def _entry_rows(module: nn.Module) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """q, k and v of every key head, and all of b and a; each head's gate z lies in between."""
    layer: Any = module
    read = (2 * layer.key_dim + layer.value_dim) // layer.num_k_heads
    head = read + layer.value_dim // layer.num_k_heads
    return {
        "in_proj_qkvz": tuple((first, first + read) for first in range(0, head * layer.num_k_heads, head)),
        "in_proj_ba": ((0, 2 * layer.num_v_heads),),
    }


FAMILY = Family(
    model_types=("qwen3_next",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("Qwen3NextGatedDeltaNet",),
    operations=deltanet_operations,
    states=deltanet_states,
    entry_rows=_entry_rows,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=claims(
        "model",
        {
            "in_proj_qkvz": ("gdn.in", _interleaved("q", "k", "v", "z")),
            "in_proj_ba": ("gdn.in.ba", _interleaved("b", "a")),
        },
    ),
    handled_config=HANDLED_CONFIG,
)
