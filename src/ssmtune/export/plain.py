"""What a model directory answers without ssmtune: a fresh process that has transformers and PEFT only.

Dimensions: T time, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.errors import CheckFailed
from ssmtune.export.base import PROMPTS
from ssmtune.models import Dtype, model_location
from ssmtune.records import write_json

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 3600

NUM_GENERATED = 4
"""Tokens that are generated after each prompt from a loader's start."""


def prompt_tokens(model: str) -> list[list[int]]:
    """Return the token ids of `PROMPTS` for MODEL."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_location(model))
    return [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]


def plain_logits(
    model: str, prompts: Sequence[Sequence[int]], *, adapter: Path | None = None, dtype: Dtype = "auto"
) -> list[torch.Tensor]:
    """Return the fp32 logits [T, V] of each prompt, from a directory (and a PEFT adapter on it) in a fresh process.

    Raises `CheckFailed` with that process's last words when it cannot load them.
    """
    found = _answers(model, prompts, adapter, dtype)
    return [found[str(i)] for i in range(len(prompts))]


@dataclass(frozen=True)
class Started:
    """What a directory's own loader makes of prompts: logits [T, V] of each (of its last token where the loader reads the
    others), the tokens generated greedily after it, and the logits [NUM_GENERATED, V] that they were taken from."""

    prompts: list[torch.Tensor]
    generated: list[list[int]]
    steps: list[torch.Tensor]


def plain_started(model: str, prompts: Sequence[Sequence[int]], *, dtype: Dtype = "auto") -> Started:
    """Return what a directory with `load_start.py` computes in a fresh process. Raises `CheckFailed` as `plain_logits`."""
    found = _answers(model, prompts, None, dtype, num_generated=NUM_GENERATED)
    numbers = range(len(prompts))
    return Started(
        prompts=[found[str(i)] for i in numbers],
        generated=[found[f"{i}.generated"].tolist() for i in numbers],
        steps=[found[f"{i}.steps"] for i in numbers],
    )


def _answers(
    model: str, prompts: Sequence[Sequence[int]], adapter: Path | None, dtype: Dtype, *, num_generated: int = 0
) -> dict[str, torch.Tensor]:
    """Run `_plain.py` in a fresh process; what it writes."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="ssmtune-plain-") as scratch:
        request: dict[str, Any] = {
            "model": model_location(model),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "dtype": dtype,
            "prompts": [list(prompt) for prompt in prompts],
            "num_generated": num_generated,
            "threads": torch.get_num_threads(),
            "out": str(Path(scratch) / "answers.safetensors"),
        }
        path = write_json(Path(scratch) / "request.json", request)
        source = (Path(__file__).parent / "_plain.py").read_text(encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-c", source, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise CheckFailed(f"plain transformers cannot load {adapter or model}: {lines[-1].strip()}")
        return load_file(request["out"])


def own_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the fp32 logits [T, V] of each prompt from a model in this process."""
    import torch

    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([list(p)]), use_cache=False).logits[0].float() for p in prompts]


def compare_logits(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the largest and the mean difference over all prompts, relative to the largest expected logit."""
    scale = max(float(e.abs().max()) for e in expected)
    worst = max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / scale
    mean = sum(float((f - e).abs().mean()) for f, e in zip(found, expected, strict=True)) / len(expected) / scale
    return {"max": worst, "mean": mean}
