"""What the gated norm must get right. Dimensions: B batch, T time, D channels."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, draw
from ssmtune.ops.gated_rms_norm import gated_rms_norm

EPS = 1e-5


def cases() -> list[Case]:
    """Return the cases: with and without a gate, in one group and in three."""
    generator = torch.Generator().manual_seed(2)
    inputs = {"x": draw(generator, 2, 5, 21), "weight": draw(generator, 21)}
    gate = {"gate": draw(generator, 2, 5, 21)}
    return [
        Case(
            operation="gated_rms_norm",
            label=f"{label}, groups of {size}",
            function=lambda t, size=size: {  # type: ignore[misc]
                "output": gated_rms_norm(t["x"], t["weight"], t.get("gate"), eps=EPS, group_size=size)
            },
            truth=lambda t, size=size: {"output": _truth(t, size)},  # type: ignore[misc]
            inputs={**inputs, **extra},
        )
        for label, extra in (("gated", gate), ("plain", {}))
        for size in (21, 7)
    ]


def _truth(t: Tensors, size: int) -> torch.Tensor:
    """Group by group, as the formula stands."""
    x = t["x"]
    if "gate" in t:
        x = x * t["gate"] / (1 + torch.exp(-t["gate"]))
    parts = [part / (part.square().sum(-1, keepdim=True) / size + EPS).sqrt() for part in torch.split(x, size, dim=-1)]
    return torch.cat(parts, dim=-1) * t["weight"]
