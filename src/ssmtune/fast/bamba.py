"""Bamba: mixer or attention, then a gated MLP of three projections."""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.fast._mamba2 import gated_mlp, mix, mixer_refusal
from ssmtune.fast.base import Block, Inside
from ssmtune.ops.gated_rms_norm import gated_rms_norm


def _refusal(layer: Any) -> str | None:
    activation = layer.feed_forward.act_fn
    if type(activation).__name__ not in ("SiLUActivation", "SiLU"):
        return f"the MLP's activation is {type(activation).__name__}, not silu"
    return mixer_refusal(layer.mamba) if layer.block_type == "linear_attention" else None


def _run(layer: Any, hidden: torch.Tensor, inside: Inside) -> tuple[torch.Tensor, Any]:
    norm, weights = layer.input_layernorm, None
    if layer.block_type == "linear_attention":
        hidden = mix(layer.mamba, norm, hidden, inside, residual=True, multiplier=1.0)
    else:
        normed = gated_rms_norm(hidden, norm.weight, eps=norm.variance_epsilon)
        attended, weights = layer.self_attn(hidden_states=normed, **inside.given)
        hidden = hidden + attended
    mlp = layer.feed_forward
    return gated_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.pre_ff_layernorm, hidden), weights


BLOCK = Block(layer_class="BambaDecoderLayer", refusal=_refusal, run=_run)
