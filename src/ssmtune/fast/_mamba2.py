"""A Mamba-2 mixer in few passes over memory, as the families' rewritten layers use it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ssmtune.fast._linear import weights_of
from ssmtune.fast._marks import component
from ssmtune.fast.base import Inside, project
from ssmtune.ops.mamba2_mixer import Adapted, Core, mamba2_mixer
from ssmtune.ops.projection import Activated, Normed

ACTIVATION = "silu"


def mixer_refusal(mixer: Any) -> str | None:
    """Why a mixer cannot be served, or None."""
    if mixer.activation not in (ACTIVATION, "swish"):
        return f"the convolution's activation is {mixer.activation!r}, not silu"
    return None


def core_of(mixer: Any) -> Core:
    """What the scan of a mixer is given."""
    limit = mixer.time_step_limit
    return Core(
        -torch.exp(mixer.A_log.float()),
        mixer.D,
        mixer.dt_bias,
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.n_groups,
        mixer.ssm_state_size,
        (0.0, math.inf) if limit is None else tuple(limit),
    )


def mix(
    mixer: Any, norm: Any, hidden: torch.Tensor, inside: Inside, *, residual: bool, multiplier: float
) -> torch.Tensor:
    """Return multiplier * mixer(norm(hidden)), with `residual` beside hidden, for a mixer whose gated norm gates first."""
    with component("recurrent"):
        own = mixer.norm
        return mamba2_mixer(
            hidden,
            Adapted(Normed(norm.weight, norm.variance_epsilon), *weights_of(mixer.in_proj)),
            core_of(mixer),
            Adapted(Normed(own.weight, own.variance_epsilon, None, own.group_size), *weights_of(mixer.out_proj)),
            residual=residual,
            multiplier=multiplier,
            seq_idx=inside.seq_idx,
        )


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
