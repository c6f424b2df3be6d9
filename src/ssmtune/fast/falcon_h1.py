"""Falcon-H1: attention and mixer side by side behind one norm, then a gated MLP, with multipliers everywhere."""

from __future__ import annotations

from typing import Any

import torch

from ssmtune.fast._mamba2 import ACTIVATION, core_of, mixer_refusal
from ssmtune.fast._marks import component
from ssmtune.fast.base import Block, Inside, project
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.mamba2_mixer.reference import conv_scan
from ssmtune.ops.projection import Activated, Normed


def _refusal(layer: Any) -> str | None:
    mixer, mlp = layer.mamba, layer.feed_forward
    if mixer.mamba_rms_norm and mixer.norm.norm_before_gate:
        return "its mixer's norm comes before the gate"
    if mixer.in_proj.bias is not None or mlp.gate_proj.bias is not None:
        return "a projection behind a multiplier has a bias"
    if type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        return f"the MLP's activation is {type(mlp.act_fn).__name__}, not silu"
    return mixer_refusal(mixer)


def _run(layer: Any, hidden: torch.Tensor, inside: Inside) -> tuple[torch.Tensor]:
    mixer, mlp, norm = layer.mamba, layer.feed_forward, layer.input_layernorm
    with component("recurrent"):
        before = Normed(norm.weight, norm.variance_epsilon)
        projected = project(mixer.in_proj, hidden, prologue=before, multiplier=mixer.ssm_in_multiplier)
        scaled = (projected * mixer.mup_vector).to(hidden.dtype)
        y, gate = conv_scan(scaled, core_of(mixer), inside.seq_idx)
        prologue: Normed | Activated = Activated(ACTIVATION, up=y)
        if mixer.mamba_rms_norm:
            size = mixer.norm.weight.shape[0] // mixer.norm.n_groups
            prologue, gate = Normed(mixer.norm.weight, mixer.norm.variance_epsilon, gate, size), y
        mixed = project(mixer.out_proj, gate, prologue=prologue, residual=hidden, multiplier=layer.ssm_out_multiplier)
    normed = gated_rms_norm(hidden, norm.weight, eps=norm.variance_epsilon)
    given = {name: value for name, value in inside.given.items() if name != "mamba_attention_mask"}
    attended, _ = layer.self_attn(hidden_states=normed * layer.attention_in_multiplier, **given)
    hidden = mixed + attended * layer.attn_out_multiplier
    with component("mlp"):
        norm = layer.pre_ff_layernorm
        before = Normed(norm.weight, norm.variance_epsilon)
        wide = project(mlp.gate_proj, hidden, prologue=before, multiplier=mlp.gate_multiplier)
        up = project(mlp.up_proj, hidden, prologue=before)
        activated = Activated(ACTIVATION, up=up)
        return (project(mlp.down_proj, wide, prologue=activated, residual=hidden, multiplier=mlp.down_multiplier),)


BLOCK = Block(layer_class="FalconH1DecoderLayer", refusal=_refusal, run=_run)
