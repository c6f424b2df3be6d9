"""What rounding to a dtype leaves of a tensor's change, and how far it moves the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

BLOCK = 1 << 17
"""Elements of a tensor that are compared at a time: with what is made of them they stay in a processor's cache."""


@dataclass(kw_only=True)
class Tally:
    """What rounding leaves of a tensor's change, and how far it moves it, added up over blocks of the tensor."""

    num: int = 0
    num_changed: int = 0
    num_survived: int = 0
    max_abs_delta: float = 0.0
    max_rounding: float = 0.0
    sum_rounding: float = 0.0

    def add(self, base: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> None:
        """Count one block: its elements in the base, their exact values (fp32), and these rounded, of one shape."""
        wide, stored_wide = base.float(), stored.float()
        # What did not change rounds to what the base rounds to, so only changed elements can differ here.
        same = stored.dtype in (base.dtype, torch.float32)
        rounded = wide if same else base.to(stored.dtype).float()
        self.num += exact.numel()
        self.num_changed += _num_different(exact, wide)
        self.num_survived += _num_different(stored_wide, rounded)
        low, high = torch.aminmax(exact - wide)
        self.max_abs_delta = max(self.max_abs_delta, abs(float(low)), abs(float(high)))
        if stored.dtype != torch.float32:
            moved = (stored_wide - exact).abs_()
            self.max_rounding = max(self.max_rounding, float(moved.max()))
            self.sum_rounding += float(moved.sum())

    def merge(self, other: Tally) -> None:
        """Add what another tally counted of the same tensor."""
        self.num += other.num
        self.num_changed += other.num_changed
        self.num_survived += other.num_survived
        self.max_abs_delta = max(self.max_abs_delta, other.max_abs_delta)
        self.max_rounding = max(self.max_rounding, other.max_rounding)
        self.sum_rounding += other.sum_rounding

    def survival(self, path: str, role: str) -> Survival:
        """Return what is left of the change of the tensor `path`."""
        return Survival(
            path=path,
            role=role,
            changed=self.num_changed / self.num,
            survives=self.num_survived / self.num_changed if self.num_changed else 0.0,
            max_abs_delta=self.max_abs_delta,
        )

    def rounding(self, path: str, role: str) -> dict[str, Any]:
        """Return how far the stored tensor `path` is from its exact fp32 value: largest and mean |difference|."""
        return {"path": path, "role": role, "max": self.max_rounding, "mean": self.sum_rounding / self.num}


def _num_different(one: torch.Tensor, other: torch.Tensor) -> int:
    if one.device.type != "cpu":
        return int((one != other).sum())
    # torch compares and counts one element at a time on a CPU, numpy many.
    return int(np.count_nonzero(np.not_equal(one.numpy(), other.numpy())))


def tally_of(base: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> Tally:
    """Return what is counted of a whole tensor: in the base, exact in fp32, and rounded."""
    tally = Tally()
    for blocks in zip(_blocks(base), _blocks(exact), _blocks(stored), strict=True):
        tally.add(*blocks)
    return tally


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
