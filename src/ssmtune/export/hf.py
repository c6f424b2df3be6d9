"""A model directory for plain transformers: every trained value in the weights, ssmtune not needed to load it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ssmtune.attach import load
from ssmtune.errors import CheckFailed
from ssmtune.export.base import ExportConfig, Target, refuse_existing
from ssmtune.export.plain import compare_logits, own_logits, plain_logits, prompt_tokens
from ssmtune.merge import adapter_directory, merge_to
from ssmtune.models import load_model
from ssmtune.widen import widen


def _run(config: ExportConfig) -> dict[str, Any]:
    out = Path(config.out)
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = config.dtype or "auto"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        draft = Path(scratch) / out.name
        merged = merge_to(config.run, draft, model=config.model, dtype=dtype, make_plain=widen)
        prompts = prompt_tokens(merged["base"])
        adapted = load(load_model(merged["base"], dtype=dtype), adapter_directory(config.run))
        trained = own_logits(adapted, prompts)
        model = widen(adapted)
        in_memory = own_logits(model, prompts)
        arrived = compare_logits(plain_logits(str(draft), prompts), in_memory)
        # The same code on the same weights: not one bit may differ.
        if arrived["max"] != 0:
            raise CheckFailed(
                f"{out}: not written. In plain transformers its logits differ from the merged model's by "
                f"{arrived['max']:.2g} of the largest; they must be the same."
            )
        draft.rename(out)
    return {
        "record_path": str(out / "export.json"),
        "files": sorted(path.name for path in out.iterdir()),
        "merged": merged,
        "check": {
            "ok": True,
            "limit": 0.0,
            "plain_to_merged": arrived,
            "merged_to_adapted": (rounding := compare_logits(in_memory, trained)),
        },
        "summary": [
            "In plain transformers, in a fresh process: the merged model's logits, bit for bit.",
            f"Rounding to {merged['dtype']} moved logits by up to {rounding['max']:.2g} of the largest.",
        ],
    }


TARGET = Target(
    writes="a model directory with the trained values in its weights",
    proves="a fresh process without ssmtune loads it and gives the merged model's logits",
    options=frozenset({"dtype"}),
    run=_run,
)
