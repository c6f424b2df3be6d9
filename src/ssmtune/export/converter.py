"""Run llama.cpp's converter on a model directory, with the config and the tokenizer told in words that it knows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.export.base import GgufType
from ssmtune.llamacpp import INSTALL
from ssmtune.records import write_json

TIMEOUT_S = 3600


def convert(model: Path, out: Path, type_: GgufType) -> dict[str, Any]:
    """Write the GGUF file `out` from the model directory, which is not changed; return what the converter found.

    The facts are the tokenizer's pre-type, what it was resolved by, and the renamed config fields.
    Raises `ConfigError` with the converter's own words for what it refuses, `MissingDependency` when it is not there.
    """
    if importlib.util.find_spec("conversion") is None or importlib.util.find_spec("gguf") is None:
        raise MissingDependency(f"--to gguf needs llama.cpp's converter: {INSTALL}")
    fields = json.loads((model / "config.json").read_text(encoding="utf-8"))
    restored = restored_fields(fields)
    with tempfile.TemporaryDirectory(prefix="ssmtune-convert-") as scratch:
        source = Path(scratch) / model.name
        source.mkdir()
        for path in model.iterdir():
            (source / path.name).symlink_to(path.resolve())
        (source / "config.json").unlink()
        changed = {key: value for key, value in (fields | restored).items() if restored.get(key, value) is not None}
        write_json(source / "config.json", changed)
        request = {
            "model": str(source),
            "out": str(out),
            "type": type_,
            "pre_type": pre_type(model),
            "partial_rope": partial_rope(fields),
            "head_of_its_own": fields["model_type"] in SCALES_THE_HEAD and fields["tie_word_embeddings"],
            "found": str(Path(scratch) / "found.json"),
        }
        run_child(
            "ssmtune.export._convert", write_json(Path(scratch) / "request.json", request), "the converter refuses it"
        )
        facts: dict[str, Any] = json.loads(Path(request["found"]).read_text(encoding="utf-8"))  # type: ignore[arg-type]
    return {**facts, "restored_config": restored}


def run_child(module: str, request: Path, failure: str) -> None:
    """Run `python -m module request`. Raises `ConfigError` with `failure` and the last line of its stderr."""
    command = [sys.executable, "-W", "ignore", "-m", module, str(request)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    if result.returncode != 0:
        raise child_error(result.stderr, result.returncode, failure)


def child_error(stderr: str, status: int, failure: str) -> ConfigError:
    """Return the error for a child that failed: `failure`, and what its stderr gives as the reason."""
    lines = [line for line in stderr.splitlines() if line.strip()] or ["it said nothing"]
    reasons = [line for line in lines if "GGML_ASSERT" in line or "error loading model" in line]
    if reasons:
        return ConfigError(f"{failure}: {reasons[0].strip()}")
    # A bare assertion says nothing; the line of code above it does.
    code = [line.strip() for line in lines[:-1] if line.strip(" ^~")]
    words = lines[-1].strip() if ":" in lines[-1] or not code else f"{lines[-1].strip()}: {code[-1]}"
    return ConfigError(f"{failure} (exit status {status}): {words}")


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


CONVERTER_WORDS: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "granitemoehybrid": _granite,
    "bamba": _bamba,
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

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_type(model: Path) -> str | None:
    """Return llama.cpp's name for the tokenizer's splitting rule, or None when it is none of those known here.

    The converter knows published tokenizers by a digest of what they make of one text, so every tokenizer trained
    anew is unknown to it. What counts is the rule by which text is split before merging; whether the name is right is
    then proven by comparing tokens.
    """
    path = model / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern == LLAMA3_SPLIT:
            # llama.cpp takes whole words from the vocabulary first for the one and not for the other.
            return "llama-bpe" if tokenizer["model"].get("ignore_merges") else "dbrx"
        if pattern == QWEN2_SPLIT:
            return "qwen2"
        if pattern == QWEN35_SPLIT:
            return "qwen35"
    return None
