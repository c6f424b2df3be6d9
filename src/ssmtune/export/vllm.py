"""vLLM: a PEFT adapter of one rank, with no module that vLLM would not apply."""

from __future__ import annotations

from typing import Any

from ssmtune.export.base import ExportConfig, Target
from ssmtune.export.engines import ATTENTION, Modules, export_for_engine

SOURCE = "vLLM, models/granitemoehybrid.py at 0195c9ec and lora/lora_model.py at 0306474e"

APPLIED: Modules = {
    "granitemoehybrid": ATTENTION | {"in_proj", "out_proj", "input_linear", "output_linear"},
}


def _run(config: ExportConfig) -> dict[str, Any]:
    return export_for_engine(config, "vllm", APPLIED, SOURCE)


TARGET = Target(
    writes="a PEFT directory whose every tensor vLLM applies",
    proves="what `--to peft` proves; that vLLM knows each module is read from its source, not run",
    options=frozenset({"drop_extras", "bake_extras"}),
    run=_run,
)
