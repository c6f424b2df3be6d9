"""What the adapted projection must get right. Dimensions: B batch, T time, I inputs, O outputs, r rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmtune.ops.case import Case, Tensors, draw
from ssmtune.ops.projection import Activated, LowRank, Normed, projection
from ssmtune.ops.projection.spec import Weight

EPS, SCALE, MULTIPLIER = 1e-5, 0.7, 0.3
NUM_IN, NUM_OUT, RANK = 24, 17, 3


def cases() -> list[Case]:
    """Return the cases: alone and adapted, with a bias, a residual, and behind each prologue."""
    generator = torch.Generator().manual_seed(5)
    weight = {"weight": draw(generator, NUM_OUT, NUM_IN)}
    low_rank = {"A": draw(generator, RANK, NUM_IN), "B": draw(generator, NUM_OUT, RANK)}
    plain, double = {"x": draw(generator, 2, 5, NUM_IN)}, {"x": draw(generator, 2, 5, 2 * NUM_IN)}
    second = {"second": draw(generator, 2, 5, NUM_IN)}
    norm = {"norm": draw(generator, NUM_IN)}
    after = {"residual": draw(generator, 2, 5, NUM_OUT)}
    bias = {"bias": draw(generator, NUM_OUT)}
    variants: list[tuple[str, str, Tensors]] = [
        ("alone", "none", plain),
        ("adapted, with bias", "none", plain | low_rank | bias),
        ("adapted, residual", "none", plain | low_rank | after),
        ("behind a norm", "norm", plain | low_rank | norm),
        ("behind a gated norm in groups, residual", "norm", plain | low_rank | norm | second | after),
        ("behind two halves", "halves", double | low_rank | after),
        ("behind silu with up", "silu", plain | second | low_rank),
        ("behind relu2", "relu2", plain | low_rank),
        ("frozen, behind a norm, bias and residual", "norm", plain | norm | bias | after),
    ]
    return [
        Case(
            operation="projection",
            stages=4,
            label=label,
            function=lambda t, kind=kind: {"output": run(t, kind)},  # type: ignore[misc]
            truth=lambda t, kind=kind: {"output": truth(t, kind)},  # type: ignore[misc]
            inputs=weight | tensors,
        )
        for label, kind, tensors in variants
    ]


def run(
    t: Tensors, kind: str, *, hold: Callable[[torch.Tensor], Weight] = torch.Tensor.detach, **options: Any
) -> torch.Tensor:
    """The projection on a case's tensors; the weights are frozen, and held as `hold` returns them."""
    prologue: Normed | Activated | None = None
    if kind == "norm":
        prologue = Normed(t["norm"].detach(), EPS, t.get("second"), NUM_IN // 2 if "second" in t else None)
    elif kind == "halves":
        prologue = Activated("silu", halves=True)
    elif kind != "none":
        prologue = Activated(kind, up=t.get("second"))
    return projection(
        t["x"],
        hold(t["weight"]),
        t["bias"].detach() if "bias" in t else None,
        low_rank=LowRank(t["A"], t["B"], SCALE) if "A" in t else None,
        prologue=prologue,
        residual=t.get("residual"),
        multiplier=MULTIPLIER,
        **options,
    )


def truth(t: Tensors, kind: str) -> torch.Tensor:
    """The formula, with the effective weight formed."""
    x = t["x"]
    if kind == "norm":
        second = t.get("second")
        x = x if second is None else x * second * torch.sigmoid(second)
        parts = x.reshape(*x.shape[:-1], 1 if second is None else 2, -1)
        parts = parts / (parts.square().mean(-1, keepdim=True) + EPS).sqrt()
        x = parts.flatten(-2) * t["norm"].detach()
    elif kind == "halves":
        x = x[..., :NUM_IN] * torch.sigmoid(x[..., :NUM_IN]) * x[..., NUM_IN:]
    elif kind == "silu":
        x = x * torch.sigmoid(x) * t["second"]
    elif kind == "relu2":
        x = x.clamp_min(0).square()
    weight = t["weight"].detach()
    if "A" in t:
        weight = weight + SCALE * t["B"] @ t["A"]
    y = MULTIPLIER * (x @ weight.T + (t["bias"].detach() if "bias" in t else 0.0))
    return y + t["residual"] if "residual" in t else y
