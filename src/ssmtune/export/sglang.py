"""SGLang: a PEFT adapter of one rank, with no module that SGLang would not apply."""

from __future__ import annotations

from typing import Any

from ssmtune.export.base import ExportConfig, Target
from ssmtune.export.engines import ATTENTION, Modules, export_for_engine

SOURCE = "SGLang, srt/lora/utils.py at 01235a16"

APPLIED: Modules = {
    # Of these models SGLang knows no sizes for in_proj, out_proj and Granite's shared MLP, and ends with an error.
    "granitemoehybrid": ATTENTION,
}


def _run(config: ExportConfig) -> dict[str, Any]:
    return export_for_engine(config, "sglang", APPLIED, SOURCE)


TARGET = Target(
    writes="a PEFT directory whose every tensor SGLang applies",
    proves="what `--to peft` proves; that SGLang knows each module is read from its source, not run",
    options=frozenset({"drop_extras", "bake_extras"}),
    run=_run,
)
