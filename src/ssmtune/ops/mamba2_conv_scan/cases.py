"""What convolution and scan in one must get right. Dimensions: B batch, T time, C channels, H heads, G groups, N states."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ssmtune.ops.case import Case, Tensors, draw, segments
from ssmtune.ops.mamba2_chunk_scan.reference import mamba2_recurrence
from ssmtune.ops.mamba2_conv_scan import mamba2_conv_scan
from ssmtune.ops.mamba2_conv_scan.reference import split

HEADS, WIDTH, GROUPS, STATE = 4, 3, 2, 5
SIZES: dict[str, Any] = {"groups": GROUPS, "state": STATE}


def cases() -> list[Case]:
    """Return the cases: odd lengths and packed documents, with limits on dt."""
    return [
        Case(
            operation="mamba2_conv_scan",
            stages=4,
            label=label,
            function=lambda t: {"output": run(t, dt_limit=(0.01, 1.5))},
            truth=lambda t: {"output": truth(t, (0.01, 1.5))},
            inputs=inputs(num_steps) | extra,
        )
        for label, num_steps, extra in (
            ("plain, 1 step", 1, {}),
            ("plain, 67 steps", 67, {}),
            ("packed, 67 steps", 67, {"seq_idx": segments(2, 67, (3, 20, 21, 64))}),
        )
    ]


def run(t: Tensors, **options: Any) -> torch.Tensor:
    """The operation on a case's tensors."""
    given: dict[str, Any] = {**t, **SIZES, **options}
    return mamba2_conv_scan(**given)


def inputs(num_steps: int) -> Tensors:
    """Random inputs of the operation."""
    generator = torch.Generator().manual_seed(num_steps)
    channels = HEADS * WIDTH + 2 * GROUPS * STATE
    return {
        "xBC_BTC": draw(generator, 2, num_steps, channels),
        "dt_BTH": draw(generator, 2, num_steps, HEADS),
        "A_H": -torch.exp(torch.linspace(-2, 1, HEADS, dtype=torch.float64)),
        "conv_weight_CK": draw(generator, channels, 4),
        "conv_bias_C": draw(generator, channels),
        "D_H": draw(generator, HEADS),
        "dt_bias_H": draw(generator, HEADS) - 1.0,
    }


def truth(t: Tensors, limit: tuple[float, float] = (0.0, math.inf)) -> torch.Tensor:
    """Tap by tap, then step by step."""
    x, documents = t["xBC_BTC"], t.get("seq_idx")
    total = t["conv_bias_C"].expand_as(x)
    num_steps, taps = x.shape[1], t["conv_weight_CK"].shape[1]
    for lag in range(min(taps, num_steps)):
        shifted = F.pad(x, (0, 0, lag, 0))[:, :num_steps]
        if documents is not None:
            same = F.pad(documents, (lag, 0), value=-1)[:, :num_steps] == documents
            shifted = shifted * same[..., None]
        total = total + shifted * t["conv_weight_CK"][:, taps - 1 - lag]
    inner, B, C = split(total * torch.sigmoid(total), HEADS, GROUPS, STATE)
    y, _ = mamba2_recurrence(
        inner,
        t["dt_BTH"],
        t["A_H"],
        B,
        C,
        D_H=t["D_H"],
        dt_bias_H=t["dt_bias_H"],
        dt_softplus=True,
        dt_limit=limit,
        seq_idx=documents,
    )
    return y.flatten(2)
