"""A low-rank change of a tensor, or of some of its rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.methods.base import Rows


class LowRank(nn.Module):
    """The effective tensor is W + (alpha / r) B A on the rows of the site, summed in fp32 and rounded once.

    A [r, in] starts as PEFT's does (Kaiming uniform, a = sqrt 5), B [rows, r] at zero. Dropout of the input cannot be
    expressed on the tensor; the rows of A are dropped instead. A tensor of E matrices [E, out, in] has factors for each.
    """

    enabled = True

    def __init__(self, weight: torch.Tensor, rows: Rows, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.rows = rows
        *matrices, num_out, num_in = weight.shape
        assert rows is None or not matrices
        num_out = num_out if rows is None else sum(end - first for first, end in rows)
        self.lora_A = nn.Parameter(torch.empty(*matrices, rank, num_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(*matrices, num_out, rank, dtype=torch.float32))
        # All matrices as one, so that the bound follows from the width of the input alone.
        nn.init.kaiming_uniform_(self.lora_A.data.flatten(0, -2), a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [..., out, in] in the weight's dtype; the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        return (weight.float() + self.change(weight.shape[0])).to(weight.dtype)

    def change(self, num_out: int) -> torch.Tensor:
        """Return the change of the whole tensor, [num_out, in] fp32, zero outside the site's rows."""
        A_rI: torch.Tensor = self.lora_A
        if self.training and self.dropout:
            A_rI = A_rI * F.dropout(torch.ones_like(A_rI[..., :1]), self.dropout)
        change = self.scale * (self.lora_B @ A_rI)
        if self.rows is None:
            return change
        pieces, taken, last = [], 0, 0
        for first, end in self.rows:
            pieces += [change.new_zeros(first - last, change.shape[1]), change[taken : taken + end - first]]
            taken, last = taken + end - first, end
        return torch.cat([*pieces, change.new_zeros(num_out - last, change.shape[1])])

    def trained(self) -> dict[str, nn.Parameter]:
        """Both factors."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}
