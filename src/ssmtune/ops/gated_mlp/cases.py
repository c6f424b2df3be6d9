"""What the gated MLP must get right. Dimensions: B batch, T time, D width, K inner width, r rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmtune.ops.case import Case, Tensors, draw
from ssmtune.ops.gated_mlp import gated_mlp
from ssmtune.ops.projection.spec import LowRank, Normed, Weight

EPS, IN_SCALE, OUT_SCALE, MULTIPLIER = 1e-5, 0.7, 1.3, 0.3
WIDTH, INNER = 12, 21


def cases() -> list[Case]:
    """Return the cases: two ranks, and without a low-rank term inside or outside."""
    generator = torch.Generator().manual_seed(8)
    frozen = {
        "x": draw(generator, 2, 5, WIDTH),
        "norm": draw(generator, WIDTH),
        "in_weight": draw(generator, 2 * INNER, WIDTH),
        "out_weight": draw(generator, WIDTH, INNER),
    }
    inner = {"in_A": draw(generator, 3, WIDTH), "in_B": draw(generator, 2 * INNER, 3)}
    outer = {"out_A": draw(generator, 5, INNER), "out_B": draw(generator, WIDTH, 5)}
    return [
        Case(
            operation="gated_mlp",
            stages=4,
            label=label,
            function=lambda t: {"output": run(t)},
            truth=lambda t: {"output": truth(t)},
            inputs=frozen | adapters,
        )
        for label, adapters in (("adapted", inner | outer), ("inner alone", inner), ("outer alone", outer))
    ]


def run(t: Tensors, *, hold: Callable[[torch.Tensor], Weight] = torch.Tensor.detach, **options: Any) -> torch.Tensor:
    """The MLP on a case's tensors; the weights are frozen, and held as `hold` returns them."""
    return gated_mlp(
        t["x"],
        Normed(t["norm"].detach(), EPS),
        hold(t["in_weight"]),
        hold(t["out_weight"]),
        LowRank(t["in_A"], t["in_B"], IN_SCALE) if "in_A" in t else None,
        LowRank(t["out_A"], t["out_B"], OUT_SCALE) if "out_A" in t else None,
        multiplier=MULTIPLIER,
        **options,
    )


def truth(t: Tensors) -> torch.Tensor:
    """The formula, with the effective weights formed."""
    x, inner, outer = t["x"], t["in_weight"].detach(), t["out_weight"].detach()
    if "in_A" in t:
        inner = inner + IN_SCALE * t["in_B"] @ t["in_A"]
    if "out_A" in t:
        outer = outer + OUT_SCALE * t["out_B"] @ t["out_A"]
    normed = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * t["norm"].detach()
    wide = normed @ inner.T
    gate, up = wide[..., :INNER], wide[..., INNER:]
    return x + MULTIPLIER * (gate * torch.sigmoid(gate) * up) @ outer.T
