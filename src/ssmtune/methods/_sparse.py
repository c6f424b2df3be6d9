"""A change of chosen entries of a tensor."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from ssmtune.errors import AttachError
from ssmtune.methods.base import Rows


class Sparse(nn.Module):
    """The effective tensor is W with W[index] += delta, summed in fp32 and given on in `dtype`; delta starts at zero.

    `index` [K] int32, sorted, counts through the site's own rows. Until `choose` has been called nothing says which
    entries train, and the forward is refused. While warming up, a dense delta trains in place of the chosen entries, or
    nothing at all.
    """

    enabled = True
    stage: Literal["waiting", "warming up", "chosen"] = "waiting"

    def __init__(self, weight: torch.Tensor, rows: Rows, *, num: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = rows
        num_rows = weight.shape[0] if rows is None else sum(end - first for first, end in rows)
        self.shape = (num_rows, *weight.shape[1:])
        self.dtype = dtype
        self.delta = nn.Parameter(torch.zeros(num, dtype=torch.float32))
        self.dense: nn.Parameter | None = None
        self.register_buffer("index", torch.zeros(num, dtype=torch.int32))
        self.register_buffer("positions", torch.zeros(num, dtype=torch.int64), persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [*] in `dtype` (fp32 for an fp32 weight); the weight itself where the edit is switched off.

        Raises `AttachError` before entries have been chosen.
        """
        if not self.enabled or (self.stage == "warming up" and self.dense is None):
            return weight
        if self.stage == "waiting":
            raise AttachError(
                f"a sparse edit of {len(self.delta)} entries of a tensor {list(self.shape)} is used before its entries are "
                "chosen: its selection is 'warmup', which 'ssmtune train' runs first. Train with a run file, load a "
                "trained adapter, or choose selection 'random' or 'magnitude'."
            )
        if self.dense is not None:
            changed = weight.float() + self.dense
        else:
            changed = weight.float().flatten().index_add(0, self.positions, self.delta).view_as(weight)
        return changed.to(torch.promote_types(self.dtype, weight.dtype))

    def trained(self) -> dict[str, nn.Parameter]:
        """The deltas of the chosen entries; while warming up the dense delta, if there is one."""
        if self.stage == "warming up":
            return {} if self.dense is None else {"": self.dense}
        return {"delta": self.delta}

    def warm_up(self, *, dense: bool) -> None:
        """Train a dense delta of the whole (unsplit) tensor instead, or nothing."""
        assert self.rows is None or not dense
        self.stage = "warming up"
        device = self.delta.device
        self.dense = nn.Parameter(torch.zeros(self.shape, dtype=torch.float32, device=device)) if dense else None

    def choose(self, index: torch.Tensor) -> None:
        """Train the entries `index` [K] of the site's rows, sorted, from the deltas that are there (zero at first)."""
        fault = self.fault_of(index)
        assert not fault, fault
        self.stage, self.dense = "chosen", None
        self.index = index.to(self.delta.device)
        width = math.prod(self.shape[1:])
        numbers = torch.arange(self.shape[0])
        if self.rows is not None:
            numbers = torch.cat([torch.arange(first, end) for first, end in self.rows])
        entries = index.cpu().long()
        self.positions = (numbers[entries // width] * width + entries % width).to(self.delta.device)

    def fault_of(self, index: torch.Tensor) -> str:
        """What is wrong with `index` as a choice of entries, or the empty string."""
        if index.dtype != torch.int32 or tuple(index.shape) != tuple(self.delta.shape):
            return f"is {index.dtype} {list(index.shape)}; expected int32 {list(self.delta.shape)}"
        if bool((index[1:] <= index[:-1]).any()) or int(index[0]) < 0 or int(index[-1]) >= math.prod(self.shape):
            return f"is not sorted, distinct and within the {math.prod(self.shape)} entries of {list(self.shape)}"
        return ""
