"""GGUF for llama.cpp and Ollama: merged and converted in fp32, then answered through llama.cpp and compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ssmtune.errors import CheckFailed
from ssmtune.export.agreement import check_gguf
from ssmtune.export.base import ExportConfig, GgufType, Target, refuse_existing
from ssmtune.export.converter import convert
from ssmtune.export.judgement import F32_LIMIT
from ssmtune.merge import merge_to
from ssmtune.records import file_sha256


def _run(config: ExportConfig) -> dict[str, Any]:
    type_ = config.type or "f16"
    out = Path(config.out)
    path = out if out.suffix == ".gguf" else out / f"model-{type_}.gguf"
    return export_gguf(config, path, type_)


def export_gguf(config: ExportConfig, path: Path, type_: GgufType) -> dict[str, Any]:
    """Merge in fp32, convert, check, and only then give the file its name. Returns the facts of the record."""
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        merged = Path(scratch) / "merged"
        facts = merge_to(config.run, merged, model=config.model, dtype="float32")
        draft = Path(scratch) / path.name
        converted = convert(merged, draft, type_)
        check = check_gguf(draft, merged, type_=type_)
        if not check["ok"]:
            raise CheckFailed(f"{path}: not written. {check['detail']}")
        draft.replace(path)
    return {
        "record_path": str(path.with_suffix(".export.json")),
        "files": {path.name: file_sha256(path)},
        "merged": {key: facts[key] for key in ("base", "base_digest", "run_id", "step", "recipe")},
        "converter": converted,
        "check": check,
        "summary": [*_types(converted), *_summary(check)],
    }


def _types(converted: dict[str, Any]) -> list[str]:
    """What a file of mixed types holds: one line, and one more where rows did not fit the type meant for them."""
    if "tensor_types" not in converted:
        return []
    lines = [f"Tensors: {', '.join(f'{num} {name}' for name, num in converted['tensor_types'].items())}."]
    if fell_back := converted["fell_back"]:
        first, change = next(iter(fell_back.items()))
        lines.append(
            f"{len(fell_back)} tensors have rows that are no multiple of 256 and are stored in a wider type than Q4_K_M "
            f"wants, as llama.cpp does ({first}: {change}); all are in the record."
        )
    return lines


def _summary(check: dict[str, Any]) -> list[str]:
    lines = [
        f"In llama.cpp: {check['detail']}; the first new token is the same for {check['same_top']} of "
        f"{check['prompts']} prompts."
    ]
    if check["gelu_table"]:
        lines.append(
            f"Warning: within {F32_LIMIT:g} is all but GELU, which llama.cpp on a CPU looks up in half precision; that moves "
            f"log-probabilities by up to {check['max_abs_logprob']:.1g} nats and is in no file."
        )
    if check["dt_limits"] and check["dt_limits"]["max_abs_effect"]:
        lines.append(
            "Warning: the config bounds dt and llama.cpp does not; on these prompts that moves log-probabilities by up "
            f"to {check['dt_limits']['max_abs_effect']:.1g} nats."
        )
    if check["same_chat"] is False:
        lines.append(
            "llama.cpp renders chats with this template otherwise than the tokenizer does: give it rendered prompts, "
            "or use --to ollama."
        )
    return lines


TARGET = Target(
    writes="one GGUF file, for llama.cpp and what is built on it",
    proves="llama.cpp splits text as the tokenizer does and gives the log-probabilities of transformers",
    options=frozenset({"type"}),
    run=_run,
)
