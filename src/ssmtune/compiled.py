"""Compile: what is trained to act where a sequence starts, as the content of a cache from which plain transformers goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from ssmtune.attach import AdaptedModel
from ssmtune.errors import AttachError
from ssmtune.families.base import Family, find_family
from ssmtune.records import write_bytes
from ssmtune.virtual_tokens import run_virtual_tokens


def compiled_starts(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return what every new sequence starts from, by the layer's index in the cache, without batch.

    `<layer>.state`: the recurrence's state as the cache keeps it, fp32 or in the model's dtype; `<layer>.window` [C, K]: the
    last inputs of its convolution, zero where nothing but a state is trained; `<layer>.keys` and `<layer>.values`
    [H, M, D]: those of learned positions that attention reads.
    A cache that holds them before the first token gives `adapted`'s outputs without what acts there; other trained tensors
    act beside them. The model is run on one token, or on its learned positions, and not changed.
    Raises `AttachError` when nothing of the adapter has such a form, or the model keeps its states in no such cache.
    """
    model, training = adapted.get_base_model(), adapted.training
    family = find_family(model.config.model_type)[1]
    adapted.eval()
    try:
        with torch.no_grad():
            cache = run_virtual_tokens(model, family)
            starts = _held(cache, model) if cache is not None else _of_recurrences(adapted, family)
    finally:
        adapted.train(training)
    if not starts:
        methods = ", ".join(sorted({site.method for site in adapted.plan.sites}))
        raise AttachError(f"nothing to compile: {methods} leaves sequences starting from zero. Serve it merged.")
    return {name: value.detach().clone() for name, value in starts.items()}


def _of_recurrences(adapted: AdaptedModel, family: Family) -> dict[str, torch.Tensor]:
    """What initial states and affixes come to: in the form of a cache that has seen one token."""
    token = torch.zeros(1, 1, dtype=torch.long, device=next(adapted.parameters()).device)
    seen = adapted(input_ids=token, use_cache=True)[family.cache]
    starts: dict[str, torch.Tensor] = {}
    like: dict[str, torch.Tensor] = {}
    for call in adapted.calls.values():
        state = call.state("initial_state") if call.start is None else call.start.state
        if state is None:
            continue
        like = like or _held(seen, adapted.get_base_model())
        starts[f"{call.layer}.state"] = state.reshape(like[f"{call.layer}.state"].shape)
        window = torch.zeros_like(like[f"{call.layer}.window"])
        if call.start is not None:
            window[:, window.shape[1] - call.start.window_CK.shape[1] :] = call.start.window_CK
        starts[f"{call.layer}.window"] = window
    return starts


def _held(cache: Any, model: Any) -> dict[str, torch.Tensor]:
    """What a cache of one row holds, under the names of `compiled_starts`. Raises `AttachError` for another kind of cache."""
    if not isinstance(cache, DynamicCache):
        raise AttachError(
            f"a {model.config.model_type} model keeps its states in a cache of its own kind, not in a DynamicCache of "
            "transformers, so there is no place for what its sequences start from. Use the adapter with ssmtune.load."
        )
    held: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and layer.has_previous_state[0]:
            held[f"{index}.window"] = layer.conv_states[0][0]
            if layer.recurrent_states[0] is not None:
                held[f"{index}.state"] = layer.recurrent_states[0][0]
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            held[f"{index}.keys"], held[f"{index}.values"] = layer.keys[0], layer.values[0]
    return held


def save_compiled(adapted: AdaptedModel, path: Path) -> None:
    """Write `compiled_starts` to the safetensors file `path`, in fp32, whole or not at all."""
    starts = {name: value.float().cpu().contiguous() for name, value in compiled_starts(adapted).items()}
    facts = {"format": "pt", "base_digest": adapted.base_digest, "plan": adapted.plan.digest}
    write_bytes(path, save(starts, metadata=facts))
