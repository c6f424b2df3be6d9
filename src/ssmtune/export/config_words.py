"""What llama.cpp's converter must be told of a config, in the words that it knows, by model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ssmtune.errors import ConfigError

Fields = Mapping[str, Any]


def _granite(fields: Fields) -> dict[str, Any]:
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    changes: dict[str, Any] = {"layer_types": [names[kind] for kind in fields["layer_types"]]}
    if not fields["num_local_experts"]:
        # Without experts the MLP has the shared width, which the converter reads under the experts' name.
        changes["intermediate_size"] = fields["shared_intermediate_size"]
    return changes


def _bamba(fields: Fields) -> dict[str, Any]:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    return {"attn_rotary_emb": int(head_dim * fields["rope_parameters"].get("partial_rotary_factor", 1.0))}


def _nemotron_h(fields: Fields) -> dict[str, Any]:
    kinds = fields["layers_block_type"]
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    changes: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
    }
    if "moe" not in kinds:
        # The converter takes the fields' presence for a mixture of experts, and reads the config through transformers,
        # which puts them back; a type that transformers does not know makes it read the file as it is.
        experts = ("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")
        changes |= {**dict.fromkeys(experts), "model_type": "nemotron_h_dense"}
    return changes


def _gated_delta(fields: Fields) -> dict[str, Any]:
    kinds = fields["layer_types"]
    interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    regular = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(kinds))]
    if kinds != regular:
        raise ConfigError(
            f"the converter knows full attention at every n-th layer only; this model's layers are {kinds}. "
            "It cannot become a GGUF file; use --to hf."
        )
    return {"full_attention_interval": interval}


def _kimi_linear(fields: Fields) -> dict[str, Any]:
    kinds, mlps = fields["layer_types"], fields["mlp_layer_types"]
    num_dense = mlps.count("dense")
    if mlps != ["dense"] * num_dense + ["sparse"] * (len(mlps) - num_dense):
        raise ConfigError(
            f"the converter knows layers without experts before those with experts only; this model's are {mlps}. "
            "It cannot become a GGUF file; use --to hf."
        )
    layers = {kind: [i + 1 for i, found in enumerate(kinds) if found == kind] for kind in set(kinds)}
    return {
        "linear_attn_config": {
            "full_attn_layers": layers.get("full_attention", []),
            "kda_layers": layers.get("linear_attention", []),
            "head_dim": fields["linear_head_dim"],
            "num_heads": fields["linear_num_heads"],
            "short_conv_kernel_size": fields["linear_conv_kernel_dim"],
        },
        "first_k_dense_replace": num_dense,
        "moe_router_activation_func": "sigmoid",
    }


CONVERTER_WORDS: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "granitemoehybrid": _granite,
    "bamba": _bamba,
    "kimi_linear": _kimi_linear,
    "nemotron_h": _nemotron_h,
    "qwen3_next": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_5_moe_text": _gated_delta,
}
"""By model type: config fields as the converter reads them, where transformers 5 has renamed or dropped them."""


def restored_fields(fields: Fields) -> dict[str, Any]:
    """Return the fields to change in a saved config so that the converter finds its layers; None stands for removal.

    >>> restored_fields({"model_type": "bamba", "hidden_size": 64, "num_attention_heads": 4,
    ...                  "rope_parameters": {"partial_rotary_factor": 0.5}})
    {'attn_rotary_emb': 8}
    """
    if "text_config" in fields:
        return {"text_config": {**fields["text_config"], **restored_fields(fields["text_config"])}}
    restore = CONVERTER_WORDS.get(fields["model_type"])
    return restore(fields) if restore else {}


def partial_rope(fields: Fields) -> dict[str, int] | None:
    """Return heads and rotated width where rope turns a part of each head and the converter takes it for all of it."""
    share = (fields.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    if fields["model_type"] not in INTERLEAVES_WHOLE_HEADS or share == 1.0:
        return None
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    return {
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields["num_key_value_heads"],
        "rotary_dim": int(head_dim * share),
    }


INTERLEAVES_WHOLE_HEADS = frozenset({"bamba"})

SCALES_THE_HEAD = frozenset({"falcon_h1"})
"""Model types whose factors of head and embeddings the converter multiplies into the two tensors, so they cannot be one."""
