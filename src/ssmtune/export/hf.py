"""A model directory for plain transformers: what was trained in its weights, or in what its sequences start from."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune import adapter_files
from ssmtune.attach import load
from ssmtune.errors import CheckFailed
from ssmtune.export.base import ExportConfig, Target, refuse_existing
from ssmtune.export.cache_start import LOADER, starting_sites, write_start
from ssmtune.export.plain import compare_logits, own_logits, plain_logits, prompt_tokens
from ssmtune.merge import adapter_directory, merge_tensors, merge_to
from ssmtune.models import load_model
from ssmtune.widen import widen

if TYPE_CHECKING:
    import torch

    from ssmtune.attach import AdaptedModel


def _run(config: ExportConfig) -> dict[str, Any]:
    out = Path(config.out)
    refuse_existing(out)
    saved = adapter_files.read(adapter_directory(config.run))
    starting = starting_sites(saved.plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    dtype = config.dtype or "auto"
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        draft = Path(scratch) / out.name
        merged = merge_to(
            config.run, draft, model=config.model, dtype=dtype, make_plain=merge_tensors if starting else widen
        )
        prompts = prompt_tokens(merged["base"])
        adapted = load(load_model(merged["base"], dtype=dtype), saved.directory)
        trained = own_logits(adapted, prompts)
        if starting:
            check = write_start(adapted, starting, draft, prompts, trained)
        else:
            check = _check_weights(adapted, draft, prompts, trained)
        draft.rename(out)
    return {
        "record_path": str(out / "export.json"),
        "files": sorted(path.name for path in out.iterdir()),
        "merged": merged,
        "check": {"ok": True, **check},
        "summary": _summary(merged["dtype"], check),
    }


def _check_weights(
    adapted: AdaptedModel, draft: Path, prompts: Sequence[Sequence[int]], trained: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Compare what a fresh process makes of the directory with the merged model in memory; `adapted` is used up."""
    in_memory = own_logits(widen(adapted), prompts)
    arrived = compare_logits(plain_logits(str(draft), prompts), in_memory)
    # The same code on the same weights: not one bit may differ.
    if arrived["max"] != 0:
        raise CheckFailed(
            f"{draft.name}: not written. In plain transformers its logits differ from the merged model's by "
            f"{arrived['max']:.2g} of the largest; they must be the same."
        )
    return {"limit": 0.0, "plain_to_merged": arrived, "merged_to_adapted": compare_logits(in_memory, trained)}


def _summary(dtype: str, check: dict[str, Any]) -> list[str]:
    apart = f"{check['merged_to_adapted']['max']:.2g} of the largest"
    if "plain_to_merged" in check:
        return [
            "In plain transformers, in a fresh process: the merged model's logits, bit for bit.",
            f"Rounding to {dtype} moved logits by up to {apart}.",
        ]
    worst = max(check["prompts_to_expected"]["max"], check["generated_to_expected"]["max"])
    return [
        f"In plain transformers, in a fresh process, from what {LOADER} puts into the cache: the adapted model's logits "
        f"within {worst:.2g} of the largest, for prompts and generated tokens. Without it this is another model.",
        *(
            ["A call of several tokens computes something else there, so the loader reads prompts one token at a time."]
            if check["one_by_one"]
            else []
        ),
        f"That is in float32; the adapted model in {dtype} is up to {apart} from it.",
    ]


TARGET = Target(
    writes="a model directory with the trained values in its weights; what acts where a sequence starts as a start of the "
    "cache, with a loader",
    proves="a fresh process without ssmtune loads it and gives the merged model's logits; from the start, those of the "
    "adapted model",
    options=frozenset({"dtype"}),
    run=_run,
)
