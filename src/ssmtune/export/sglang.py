"""SGLang: a PEFT adapter of one rank, with no module that SGLang would not apply."""

from __future__ import annotations

from typing import Any

from ssmtune.export.base import ExportConfig, Target
from ssmtune.export.engines import ATTENTION, GATED_MLP, Modules, export_for_engine

SOURCE = "SGLang's main branch of mid-2026, python/sglang/srt/lora/utils.py and srt/models/nemotron_h.py"

APPLIED: Modules = {
    "llama": ATTENTION | GATED_MLP,
    "mistral": ATTENTION | GATED_MLP,
    "qwen3": ATTENTION | GATED_MLP,
    # Of these models SGLang knows no sizes for in_proj, out_proj and Granite's shared MLP, and ends with an error.
    "granitemoehybrid": ATTENTION,
    "falcon_h1": ATTENTION | GATED_MLP,
    "nemotron_h": ATTENTION | {"in_proj", "out_proj", "up_proj", "down_proj"},
}


def _run(config: ExportConfig) -> dict[str, Any]:
    return export_for_engine(config, "sglang", APPLIED, SOURCE)


TARGET = Target(
    writes="a PEFT directory whose every tensor SGLang applies",
    proves="what `--to peft` proves; that SGLang knows each module is read from its source, not run",
    options=frozenset({"drop_extras", "bake_extras"}),
    run=_run,
)
