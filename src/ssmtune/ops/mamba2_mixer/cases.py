"""What the mixer must get right. Dimensions: B batch, T time, D width, H heads, P head width, C channels, r rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmtune.ops.case import Case, Tensors, draw, segments
from ssmtune.ops.mamba2_conv_scan import cases as conv_scan
from ssmtune.ops.mamba2_mixer import Adapted, Core, mamba2_mixer
from ssmtune.ops.projection.spec import LowRank, Normed, Weight

EPS, IN_SCALE, OUT_SCALE, MULTIPLIER = 1e-5, 0.7, 1.3, 0.3
WIDTH, HEADS, GROUPS, STATE = 10, conv_scan.HEADS, conv_scan.GROUPS, conv_scan.STATE
INNER = HEADS * conv_scan.WIDTH
CHANNELS = INNER + 2 * GROUPS * STATE
NORM_GROUP = INNER // 2
GATED_EPS = 0.1
"""So large that a group of few channels is well conditioned: with 1e-5 the norm blows up what bf16 rounds in groups near
zero, and so does a limit on dt, at which a gradient jumps; `mamba2_conv_scan` has cases with one."""
FROZEN = ("norm", "gated_norm", "in_weight", "out_weight", "conv_weight_CK", "conv_bias_C")


def cases() -> list[Case]:
    """Return the cases: adapted with and without packed documents and residual, and one projection adapted alone."""
    return [
        Case(
            operation="mamba2_mixer",
            stages=8,
            label=label,
            function=lambda t, residual=residual: {"output": run(t, residual)},  # type: ignore[misc]
            truth=lambda t, residual=residual: {"output": truth(t, residual)},  # type: ignore[misc]
            inputs={name: value for name, value in inputs(num_steps).items() if name not in without} | extra,
        )
        for label, num_steps, residual, extra, without in (
            ("adapted, 1 step", 1, True, {}, ()),
            ("adapted, 67 steps", 67, True, {}, ()),
            ("without residual, 67 steps", 67, False, {}, ()),
            ("packed, 67 steps", 67, True, {"seq_idx": segments(2, 67, (3, 20, 21, 64))}, ()),
            ("inner projection frozen, 67 steps", 67, True, {}, ("in_A", "in_B")),
        )
    ]


def inputs(num_steps: int) -> Tensors:
    """Random inputs; small weights, so that bf16's roundings are not multiplied up on their way through the stages."""
    generator = torch.Generator().manual_seed(num_steps)
    core = {name: value for name, value in conv_scan.inputs(num_steps).items() if name not in ("xBC_BTC", "dt_BTH")}
    core |= {"conv_weight_CK": core["conv_weight_CK"] / 2, "dt_bias_H": core["dt_bias_H"] - 1.5}
    wide = INNER + CHANNELS + HEADS
    return core | {
        "x": draw(generator, 2, num_steps, WIDTH),
        "norm": draw(generator, WIDTH),
        "in_weight": draw(generator, wide, WIDTH) / WIDTH**0.5,
        "in_A": draw(generator, 3, WIDTH) / WIDTH**0.5,
        "in_B": draw(generator, wide, 3) / 4,
        "gated_norm": draw(generator, INNER),
        "out_weight": draw(generator, WIDTH, INNER),
        "out_A": draw(generator, 5, INNER) / 4,
        "out_B": draw(generator, WIDTH, 5),
    }


def run(
    t: Tensors, residual: bool, *, hold: Callable[[torch.Tensor], Weight] = torch.Tensor.detach, **options: Any
) -> torch.Tensor:
    """The operation on a case's tensors; the projections' weights are held as `hold` returns them."""
    t = t | {name: t[name].detach() for name in FROZEN}
    return mamba2_mixer(
        t["x"],
        Adapted(Normed(t["norm"], EPS), hold(t["in_weight"]), None, _low_rank(t, "in", IN_SCALE)),
        Core(t["A_H"], t["D_H"], t["dt_bias_H"], t["conv_weight_CK"], t["conv_bias_C"], GROUPS, STATE),
        Adapted(
            Normed(t["gated_norm"], GATED_EPS, None, NORM_GROUP),
            hold(t["out_weight"]),
            None,
            _low_rank(t, "out", OUT_SCALE),
        ),
        residual=residual,
        multiplier=MULTIPLIER,
        seq_idx=t.get("seq_idx"),
        **options,
    )


def _low_rank(t: Tensors, side: str, scale: float) -> LowRank | None:
    return LowRank(t[f"{side}_A"], t[f"{side}_B"], scale) if f"{side}_A" in t else None


def truth(t: Tensors, residual: bool) -> torch.Tensor:
    """The formula, with the effective weights formed and the scan step by step."""
    t = t | {name: t[name].detach() for name in FROZEN}
    inner, outer = t["in_weight"], t["out_weight"] + OUT_SCALE * t["out_B"] @ t["out_A"]
    if "in_A" in t:
        inner = inner + IN_SCALE * t["in_B"] @ t["in_A"]
    x = t["x"]
    projected = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * t["norm"]) @ inner.T
    gate, xBC, dt = torch.split(projected, [INNER, CHANNELS, HEADS], dim=-1)
    y = conv_scan.truth(t | {"xBC_BTC": xBC, "dt_BTH": dt})
    gated = (y * gate * torch.sigmoid(gate)).view(*y.shape[:-1], -1, NORM_GROUP)
    normed = (gated / (gated.square().mean(-1, keepdim=True) + GATED_EPS).sqrt()).flatten(-2) * t["gated_norm"]
    out: torch.Tensor = MULTIPLIER * normed @ outer.T
    return x + out if residual else out
