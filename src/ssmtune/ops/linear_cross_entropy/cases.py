"""What the head's loss must get right. Dimensions: N tokens, D width, V vocabulary."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, draw
from ssmtune.ops.linear_cross_entropy import linear_cross_entropy


def cases() -> list[Case]:
    """Return the cases: one token and several, a vocabulary of no round size."""
    generator = torch.Generator().manual_seed(6)
    weight = draw(generator, 37, 12)
    return [
        Case(
            operation="linear_cross_entropy",
            stages=4,
            label=f"{num} token{'s' * (num > 1)}",
            function=lambda t: {"loss": linear_cross_entropy(t["hidden"], t["weight"].detach(), t["targets"])},
            truth=lambda t: {"loss": _truth(t)},
            inputs={
                "hidden": draw(generator, num, 12),
                "weight": weight,
                "targets": torch.randint(37, (num,), generator=generator),
            },
        )
        for num in (1, 9)
    ]


def _truth(t: Tensors) -> torch.Tensor:
    logits = t["hidden"] @ t["weight"].detach().T
    return (torch.logsumexp(logits, dim=1) - logits.gather(1, t["targets"][:, None])[:, 0]).sum()
