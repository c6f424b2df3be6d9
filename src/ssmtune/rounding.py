"""What rounding to a dtype leaves of a tensor's change, and how far it moves the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

BLOCK = 1 << 18
"""Elements of a tensor that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of one tensor's change is left after rounding to a dtype.

    `changed` is the share of elements whose exact value differs from the base, `survives` the share of those that
    still differ after rounding.
    """

    path: str
    role: str
    changed: float
    survives: float
    max_abs_delta: float


def survival_of(path: str, role: str, base: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> Survival:
    """Return how much of one tensor's change, from `base` to the exact fp32 `value`, is left after rounding to `dtype`.

    Compared in blocks that stay in a processor's cache.
    """
    num_changed = num_survived = 0
    largest = 0.0
    for old, new in zip(_blocks(base), _blocks(value), strict=True):
        wide = old.float()
        changed = new != wide
        num_changed += int(changed.sum())
        num_survived += int((changed & (new.to(dtype) != old.to(dtype))).sum())
        largest = max(largest, float((new - wide).abs().max()))
    return Survival(
        path=path,
        role=role,
        changed=num_changed / value.numel(),
        survives=num_survived / num_changed if num_changed else 0.0,
        max_abs_delta=largest,
    )


def _blocks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return torch.split(tensor.detach().reshape(-1), BLOCK)


def survival_by_role(report: list[Survival]) -> list[dict[str, Any]]:
    """Return the report averaged over the tensors of each role, for tables."""
    rows = []
    for role in sorted({entry.role for entry in report}):
        members = [asdict(entry) for entry in report if entry.role == role]
        rows.append(
            {
                "role": role,
                "tensors": len(members),
                "changed": sum(m["changed"] for m in members) / len(members),
                "survives": sum(m["survives"] for m in members) / len(members),
                "max_abs_delta": max(m["max_abs_delta"] for m in members),
            }
        )
    return rows


def rounding_of(path: str, role: str, exact: torch.Tensor, stored: torch.Tensor) -> dict[str, Any]:
    """Return how far one stored tensor is from its exact fp32 value: largest and mean |difference|."""
    largest, total = 0.0, 0.0
    for a, b in zip(_blocks(exact), _blocks(stored), strict=True):
        difference = (b.float() - a).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.sum(dtype=torch.float64))
    return {"path": path, "role": role, "max": largest, "mean": total / exact.numel()}
