"""Run llama.cpp's converter on a model directory, with the config and the tokenizer told in words that it knows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.export.base import GgufType
from ssmtune.export.config_words import SCALES_THE_HEAD, partial_rope, restored_fields
from ssmtune.llamacpp import INSTALL
from ssmtune.records import write_json

TIMEOUT_S = 3600


def convert(model: Path, out: Path, type_: GgufType) -> dict[str, Any]:
    """Write the GGUF file `out` from the model directory, which is not changed; return what the converter found.

    The facts are the tokenizer's pre-type, what it was resolved by, and the renamed config fields; for q4_k_m also how
    many tensors have which type, and those whose rows do not fit the type that llama.cpp's rule wants.
    Raises `ConfigError` with the converter's own words for what it refuses, `MissingDependency` when it is not there.
    """
    if importlib.util.find_spec("conversion") is None or importlib.util.find_spec("gguf") is None:
        raise MissingDependency(f"--to gguf needs llama.cpp's converter: {INSTALL}")
    if type_ == "q4_k_m":
        return _convert_and_quantise(model, out)
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


def _convert_and_quantise(model: Path, out: Path) -> dict[str, Any]:
    """Write `out` from a file of f32 beside it, so that every weight is rounded once."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        scratch = Path(name)
        paths = {key: scratch / key for key in ("source", "out", "found")}
        facts = convert(model, paths["source"], "f32")
        request = write_json(scratch / "request.json", {key: str(path) for key, path in paths.items()})
        run_child("ssmtune.export._quantise", request, "llama.cpp's quantiser refuses it")
        paths["out"].replace(out)
        return {**facts, **json.loads(paths["found"].read_text(encoding="utf-8"))}


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
