"""What this model's sequences start from was trained and is no weight; `start` puts it into the cache of a new batch.

    inputs = start(model, tokenizer(text, return_tensors="pt")["input_ids"])
    model(**inputs).logits    # or, after another `start`: model.generate(**inputs, max_new_tokens=20)

It needs torch, transformers and safetensors. A cache serves one batch: call `start` for each.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache

ONE_BY_ONE = False
"""Whether `start` reads all tokens but the last itself, one at a time: where a call of several would lose the start."""


def start(model: Any, input_ids: Any, attention_mask: Any = None, num_beams: int = 1) -> dict[str, Any]:
    """Return the inputs for `model` or `model.generate`, which continue from the trained start; rows must be of one length."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("padding would wear off the trained start: give rows of one length, without padding")
    held = load_file(Path(__file__).with_name("start.safetensors"), device=str(model.device))
    cache, num_seen = DynamicCache(config=model.config), 0
    rows = {name: value.expand(len(input_ids) * num_beams, *value.shape) for name, value in held.items()}
    for name, value in rows.items():
        layer, _, kind = name.partition(".")
        if kind == "window":
            cache.update_conv_state(value.to(model.dtype), int(layer))
        elif kind == "state":
            cache.update_recurrent_state(value, int(layer))
        elif kind == "keys":
            cache.update(value.to(model.dtype), rows[f"{layer}.values"].to(model.dtype), int(layer))
            num_seen = value.shape[-2]
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"cache_params" if "cache_params" in takes else "past_key_values": cache}
    mask = input_ids.new_ones(len(input_ids), num_seen + input_ids.shape[1])
    while ONE_BY_ONE and input_ids.shape[1] > 1:
        with torch.no_grad():
            model(input_ids=input_ids[:, :1].repeat_interleave(num_beams, 0), use_cache=True, **given)
        input_ids = input_ids[:, 1:]
    if num_seen and "position_ids" in takes:
        given["position_ids"] = torch.arange(mask.shape[1] - input_ids.shape[1], mask.shape[1], device=mask.device)[
            None
        ]
    return {"input_ids": input_ids, "attention_mask": mask, **given}
