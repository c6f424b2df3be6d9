"""Granite 4 hybrids: mixer or attention, then a gated MLP whose two halves are one projection."""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.fast._linear import weights_of
from ssmtune.fast._mamba2 import mix, mixer_refusal
from ssmtune.fast._marks import component
from ssmtune.fast.base import Block, Inside
from ssmtune.ops.gated_mlp import gated_mlp
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.projection import Normed


def _refusal(layer: Any) -> str | None:
    if layer.has_experts:
        return "it has routed experts"
    activation = layer.shared_mlp.activation
    if type(activation).__name__ not in ("SiLUActivation", "SiLU"):
        return f"the MLP's activation is {type(activation).__name__}, not silu"
    return None if layer.mamba is None else mixer_refusal(layer.mamba)


def _run(layer: Any, hidden: torch.Tensor, inside: Inside) -> torch.Tensor:
    multiplier, norm, mlp = layer.residual_multiplier, layer.input_layernorm, layer.shared_mlp
    if layer.mamba is not None:
        hidden = mix(layer.mamba, norm, hidden, inside, residual=True, multiplier=multiplier)
    else:
        normed = gated_rms_norm(hidden, norm.weight, eps=norm.variance_epsilon)
        attended, _ = layer.self_attn(hidden_states=normed, **inside.given)
        hidden = hidden + attended * multiplier
    with component("mlp"):
        norm = layer.post_attention_layernorm
        in_weight, _, in_low_rank = weights_of(mlp.input_linear)
        out_weight, _, out_low_rank = weights_of(mlp.output_linear)
        before = Normed(norm.weight, norm.variance_epsilon)
        return gated_mlp(hidden, before, in_weight, out_weight, in_low_rank, out_low_rank, multiplier=multiplier)


BLOCK = Block(layer_class="GraniteMoeHybridDecoderLayer", refusal=_refusal, run=_run)
