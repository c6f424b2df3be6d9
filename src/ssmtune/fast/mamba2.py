"""Mamba-2: one norm and one mixer in each layer; the residual stream may be fp32."""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.fast._mamba2 import mix, mixer_refusal
from ssmtune.fast.base import Block, Inside


def _run(layer: Any, hidden: torch.Tensor, inside: Inside) -> torch.Tensor:
    inputs = hidden.to(layer.norm.weight.dtype)
    if not layer.residual_in_fp32 or inputs.dtype == torch.float32:
        return mix(layer.mixer, layer.norm, inputs, inside, residual=True, multiplier=1.0)
    # The product's sum would round the residual to the product's precision.
    return hidden.float() + mix(layer.mixer, layer.norm, inputs, inside, residual=False, multiplier=1.0)


BLOCK = Block(layer_class="Mamba2Block", refusal=lambda layer: mixer_refusal(layer.mixer), run=_run)
