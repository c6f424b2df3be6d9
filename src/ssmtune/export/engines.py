"""What the serving engines read of a PEFT adapter, from their published sources; what they would drop is refused here.

Both split a module's name at its last dot and know a fixed set of those endings for each architecture. vLLM reads
`r` and `lora_alpha` but no `rank_pattern` or `alpha_pattern`, so every factor is written with one rank and alpha = rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmtune import adapter_files
from ssmtune.errors import ConfigError
from ssmtune.export.base import ExportConfig
from ssmtune.export.factors import Factors, uniform_factors
from ssmtune.export.magnitudes import refuse_magnitudes
from ssmtune.export.peft import export_peft
from ssmtune.merge import adapter_directory
from ssmtune.models import load_config

ATTENTION = frozenset("q_proj k_proj v_proj o_proj".split())

Modules = Mapping[str, frozenset[str]]
"""By model type, the endings of the module names that an engine applies a LoRA to."""


def export_for_engine(config: ExportConfig, engine: str, applied: Modules, source: str) -> dict[str, Any]:
    """Write a PEFT directory that the engine applies in full. Raises `ConfigError` for what it would drop or misread."""
    saved = adapter_files.read(adapter_directory(config.run))
    model_type = load_config(config.model or saved.plan.model).model_type
    if model_type not in applied:
        raise ConfigError(
            f"--to {engine}: which adapters {engine} applies to {model_type!r} has not been read from its source "
            f"({source}); known: {', '.join(sorted(applied))}. Use --to hf and serve the merged model."
        )
    packed = sorted({s.role for s in saved.plan.sites if s.container == "module" and len(s.shape) == 3})
    if packed:
        raise ConfigError(
            f"--to {engine}: adapters of packed experts ({', '.join(packed)}) have another layout there. Use --to hf."
        )

    refuse_magnitudes(saved, engine, engine, "--to hf and serve the merged model")

    def checked(factors: dict[str, Factors]) -> dict[str, Factors]:
        lost = sorted({name.rpartition(".")[2] for name in factors} - applied[model_type])
        if lost:
            raise ConfigError(
                f"--to {engine}: {engine} applies no LoRA to {', '.join(lost)} of {model_type!r} ({source}), so that part "
                "would be dropped or refused there. Use --to hf and serve the merged model."
            )
        return uniform_factors(factors)

    facts = export_peft(config, checked)
    return {**facts, "engine": {"name": engine, "source": source, "applied": sorted(applied[model_type])}}
