"""vLLM: a PEFT adapter of one rank, with no module that vLLM would not apply."""

from __future__ import annotations

from typing import Any

from ssmtune.export.base import ExportConfig, Target
from ssmtune.export.engines import ATTENTION, GATED_MLP, Modules, export_for_engine

SOURCE = "vLLM's main branch of September 2026, vllm/model_executor/models/*.py and vllm/lora/lora_model.py"

APPLIED: Modules = {
    "llama": ATTENTION | GATED_MLP,
    "mistral": ATTENTION | GATED_MLP,
    "qwen3": ATTENTION | GATED_MLP,
    "granitemoehybrid": ATTENTION | {"in_proj", "out_proj", "input_linear", "output_linear"},
    # in_proj is a merged layer that the model's packed_modules_mapping does not name, so it gets no LoRA layer.
    "falcon_h1": ATTENTION | GATED_MLP | {"out_proj"},
    "jamba": ATTENTION | GATED_MLP | {"in_proj", "out_proj"},
    "qwen3_next": ATTENTION | GATED_MLP | {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    "lfm2": frozenset("q_proj k_proj v_proj out_proj in_proj w1 w2 w3".split()),
}


def _run(config: ExportConfig) -> dict[str, Any]:
    return export_for_engine(config, "vllm", APPLIED, SOURCE)


TARGET = Target(
    writes="a PEFT directory whose every tensor vLLM applies",
    proves="what `--to peft` proves; that vLLM knows each module is read from its source, not run",
    options=frozenset({"drop_extras", "bake_extras"}),
    run=_run,
)
