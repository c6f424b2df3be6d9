"""Adapters as this release saves them, on a tiny base that needs no random numbers; every later release must load them.

Run from the repository root, once for a release: python recipes/golden_adapters.py VERSION
Writes tests/golden/VERSION/{config.json, logits.safetensors, RECIPE/...}; what exists is not written again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ssmtune.attach import attach
from ssmtune.families.base import get_family
from ssmtune.models import load_config
from ssmtune.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
RECIPES = {"all+core": {"rank": 2, "alpha": 4.0}, "initial-state": {}, "norm": {}}
TOKENS = [[3, 1, 4, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 4, 6, 26, 4, 33, 8, 32, 7, 9, 5]]


def numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers in [-1, 1) that look random and are the same everywhere: a multiplication modulo 2^16, exact in fp32."""
    count = torch.arange(1, int(torch.Size(shape).numel()) + 1, dtype=torch.int64)
    return (((count * 40503 + seed * 9973) * count % 65536).float() / 32768 - 1).reshape(shape)


def golden_base(config_path: Path) -> Any:
    """The base of the golden adapters, in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(load_config(str(config_path)), dtype=torch.float32)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            values = numbers(tuple(parameter.shape), seed)
            if "norm" in name or name.endswith(".D"):
                parameter.copy_(1 + 0.25 * values)
            else:
                parameter.copy_(values if parameter.dim() == 1 else 1.5 * values / parameter.shape[-1] ** 0.5)
    model.config.name_or_path = "golden"
    return model.eval()


def move(adapted: Any) -> None:
    """Give every trained parameter a value."""
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(sorted(adapted.trained_parameters().items())):
            parameter.copy_(0.25 * numbers(tuple(parameter.shape), 1000 + seed))


def logits_of(model: Any) -> torch.Tensor:
    """Logits [1, T, V] on the golden tokens."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor(TOKENS), use_cache=False).logits
    return logits


def main(version: str) -> int:
    """Write the adapters of one release."""
    target = GOLDEN / version
    if target.exists():
        print(f"{target}: exists already; what a release saved does not change.", file=sys.stderr)
        return 2
    target.mkdir(parents=True)
    get_family("granite_hybrid").tiny_configs()["dense"].to_json_file(target / "config.json")
    logits = {}
    for recipe, options in RECIPES.items():
        base = golden_base(target / "config.json")
        adapted = attach(base, make_plan(base, recipe, **options))
        move(adapted)
        adapted.eval().save_pretrained(target / recipe, step=1, run_id=f"golden-{version}")
        logits[recipe] = logits_of(adapted)
    save_file(logits, target / "logits.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
