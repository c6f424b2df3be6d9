"""What changes when an adapter that was trained on a base in 4 bits is merged into the original weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ssmtune.adapter_files import SavedAdapter
from ssmtune.attach import attach_saved
from ssmtune.models import load_model
from ssmtune.quantize import load_base
from ssmtune.quantized import quantized_of

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel

PRECISIONS: tuple[Literal["auto", "bfloat16"], ...] = ("auto", "bfloat16")
"""In which a base may have been loaded for training: the checkpoint's own, or rounded to bf16."""


def difference_to_training(saved: SavedAdapter, name: str, draft: Path, ids_BT: torch.Tensor | None) -> dict[str, Any]:
    """Return what the base was held as in training, and how far the merged model's logits are from those of that model.

    `draft` is the merged model, `name` its base. Largest and mean difference over the tokens `ids_BT` [B, T], relative to
    the largest logit of the model as trained; None without tokens. It is the quantisation error of the base, which the
    merged model does not have.
    """
    assert saved.quantized is not None
    facts: dict[str, Any] = {"trained_on": saved.quantized.describe(), **saved.quantized.to_dict(), "prompts": None}
    if ids_BT is None:
        return facts
    trained, merged = _as_trained(saved, name), load_model(str(draft)).eval()
    with torch.no_grad():
        expected, found = (model(input_ids=ids_BT, use_cache=False).logits.float() for model in (trained, merged))
    difference, scale = (found - expected).abs(), float(expected.abs().max())
    facts["prompts"] = {
        "num": len(ids_BT),
        "max": float(difference.max()) / scale,
        "mean": float(difference.mean()) / scale,
    }
    return facts


def _as_trained(saved: SavedAdapter, name: str) -> AdaptedModel:
    """The adapter on the base in 4 bits. Raises `AdapterMismatch` for another base."""
    assert saved.quantized is not None
    for dtype in PRECISIONS:
        base = load_base(name, dtype=dtype, quantize_config=saved.quantized.config)
        found = quantized_of(base)
        if found is not None and found.base_digest == saved.base_digest:
            break
    return attach_saved(base, saved)
