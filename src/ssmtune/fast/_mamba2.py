"""A Mamba-2 mixer in few passes over memory, as the families' rewritten layers use it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ssmtune.fast._marks import component
from ssmtune.fast.base import Inside, project
from ssmtune.ops.mamba2_conv_scan import mamba2_conv_scan
from ssmtune.ops.projection import Activated, Normed

ACTIVATION = "silu"


def mixer_refusal(mixer: Any) -> str | None:
    """Why a mixer cannot be served, or None."""
    if mixer.activation not in (ACTIVATION, "swish"):
        return f"the convolution's activation is {mixer.activation!r}, not silu"
    return None


def inner(mixer: Any, projected: torch.Tensor, inside: Inside) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scan's output [B, T, H P] and the gate z of the same shape, from what in_proj gave."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    gate, xBC, dt = torch.split(projected, sizes, dim=-1)
    limit = mixer.time_step_limit
    y = mamba2_conv_scan(
        xBC,
        dt,
        -torch.exp(mixer.A_log.float()),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        groups=mixer.n_groups,
        state=mixer.ssm_state_size,
        D_H=mixer.D,
        dt_bias_H=mixer.dt_bias,
        dt_limit=(0.0, math.inf) if limit is None else tuple(limit),
        seq_idx=inside.seq_idx,
    )
    return y, gate


def mix(
    mixer: Any, norm: Any, hidden: torch.Tensor, inside: Inside, *, residual: torch.Tensor | None, multiplier: float
) -> torch.Tensor:
    """Return residual + multiplier * mixer(norm(hidden)) for a mixer whose gated norm gates first."""
    with component("recurrent"):
        projected = project(mixer.in_proj, hidden, prologue=Normed(norm.weight, norm.variance_epsilon))
        y, gate = inner(mixer, projected, inside)
        gated = Normed(mixer.norm.weight, mixer.norm.variance_epsilon, gate, mixer.norm.group_size)
        return project(mixer.out_proj, y, prologue=gated, residual=residual, multiplier=multiplier)


def gated_mlp(
    gate_proj: Any, up_proj: Any, down_proj: Any, norm: Any, hidden: torch.Tensor, *, down_multiplier: float = 1.0
) -> torch.Tensor:
    """Return hidden + multiplier * down(silu(gate(norm(hidden))) * up(norm(hidden)))."""
    with component("mlp"):
        before = Normed(norm.weight, norm.variance_epsilon)
        gate, up = project(gate_proj, hidden, prologue=before), project(up_proj, hidden, prologue=before)
        return project(
            down_proj, gate, prologue=Activated(ACTIVATION, up=up), residual=hidden, multiplier=down_multiplier
        )
