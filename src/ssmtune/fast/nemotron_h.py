"""Nemotron-H: one norm and one mixer in each layer: Mamba-2, attention, or an MLP with squared relu."""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.fast._mamba2 import mix, mixer_refusal
from ssmtune.fast._marks import component
from ssmtune.fast.base import Block, Inside, project
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.projection import Activated, Normed

MLP = "NemotronHMLP"


def _refusal(layer: Any) -> str | None:
    kind = type(layer.mixer).__name__
    if layer.block_type == "linear_attention":
        return mixer_refusal(layer.mixer)
    if layer.block_type == "full_attention":
        return None
    if kind != MLP:
        return f"its mixer is a {kind}"
    activation = type(layer.mixer.act_fn).__name__
    return None if activation == "ReLUSquaredActivation" else f"the MLP's activation is {activation}, not relu2"


def _run(layer: Any, hidden: torch.Tensor, inside: Inside) -> torch.Tensor:
    norm, mixer = layer.norm, layer.mixer
    hidden = hidden.to(norm.weight.dtype)
    if layer.block_type == "linear_attention":
        return mix(mixer, norm, hidden, inside, residual=True, multiplier=1.0)
    if layer.block_type == "full_attention":
        normed = gated_rms_norm(hidden, norm.weight, eps=norm.variance_epsilon)
        attended: torch.Tensor = mixer(hidden_states=normed, **inside.given)[0]
        return hidden + attended
    with component("mlp"):
        wide = project(mixer.up_proj, hidden, prologue=Normed(norm.weight, norm.variance_epsilon))
        return project(mixer.down_proj, wide, prologue=Activated("relu2"), residual=hidden)


BLOCK = Block(layer_class="NemotronHBlock", refusal=_refusal, run=_run)
