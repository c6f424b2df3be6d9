"""The table of the matched sisters in docs/matched-sisters.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pretrain import TOKENIZER_PATH
from pretrain_matched import SISTERS_PATH, build_sister, load_sisters
from transformers import AutoTokenizer

from ssmtune.inventory import take_inventory
from ssmtune.records import read_record

RECORDS = Path(__file__).resolve().parent.parent / "records" / "pretrain"
GROUPS = ("attention", "recurrent", "core", "conv", "mlp", "embedding")


def sisters_markdown() -> str:
    """Parameters by group, from the configs, and tokens and bits per byte, from the records; "not run" without one."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
    header = ["sister", "model type", "parameters", *GROUPS, "tokens seen", "held-out bits per byte", "compiled"]
    lines = [header, ["---"] * len(header)]
    for name, config in load_sisters(SISTERS_PATH).items():
        with torch.device("meta"):
            inventory = take_inventory(build_sister(config, tokenizer))
        sizes = [
            sum(component.num_params for component in inventory.components if component.group == group)
            for group in GROUPS
        ]
        path = RECORDS / f"{name}.json"
        found = _figures(read_record(path, kind="pretrain")) if path.exists() else ["not run"] * 3
        lines.append(
            [f"`{name}`", f"`{config.model['model_type']}`", f"{inventory.total:,}", *(f"{n:,}" for n in sizes), *found]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(record: dict[str, Any]) -> list[str]:
    is_compiled = "yes" if record["compile"]["used"] else "no"
    return [f"{record['num_tokens']:,}", f"{record['held_out']['bits_per_byte']:.3f}", is_compiled]
