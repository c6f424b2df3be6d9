"""A low-rank change of a tensor, or of some of its rows, alone or with what later methods put beside the product.

Dimensions: r rank, I inputs, O outputs of the tensor, R rows of the site, E experts (a packed tensor is one matrix each).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.methods.base import Rows


def take_rows(weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return the rows of the site, [R, I]; the tensor itself where the site is all of it."""
    return weight if rows is None else torch.cat([weight[first:end] for first, end in rows])


def put_rows(weight: torch.Tensor, rows: Rows, changed: torch.Tensor) -> torch.Tensor:
    """Return `weight` with `changed`, [R, I], in place of the rows of the site; `changed` where the site is all of it."""
    if rows is None:
        return changed
    pieces, taken, last = [], 0, 0
    for first, end in rows:
        pieces += [weight[last:first], changed[taken : taken + end - first]]
        taken, last = taken + end - first, end
    return torch.cat([*pieces, weight[last:]])


class LowRank(nn.Module):
    """The effective tensor is W + s (B A - B0 A0) on the rows of the site, summed in fp32 and rounded once.

    A [r, I] starts as PEFT's does (Kaiming uniform, a = sqrt 5), B [R, r] at zero; then there is no B0 A0. `principal`
    starts both at the r largest singular values of W: s B0 A0 is W's principal part, as in PEFT's PiSSA.
    Dropout of the input cannot be expressed on the tensor; the rows of A (and A0) are dropped instead.
    """

    enabled = True

    def __init__(
        self, weight: torch.Tensor, rows: Rows, *, rank: int, scale: float, dropout: float, principal: bool = False
    ) -> None:
        super().__init__()
        self.rows = rows
        self.scale = scale
        self.dropout = dropout
        site = take_rows(weight.detach(), rows)
        *experts, num_out, num_in = site.shape
        A = torch.empty(*experts, rank, num_in, dtype=torch.float32)
        B = torch.zeros(*experts, num_out, rank, dtype=torch.float32)
        if principal:
            U, S, Vh = torch.linalg.svd(site.float().cpu(), full_matrices=False)
            root = (S[..., :rank] / scale).sqrt()
            A, B = (root[..., None] * Vh[..., :rank, :]).contiguous(), U[..., :rank] * root[..., None, :]
            self.register_buffer("start_A", A.clone())
            self.register_buffer("start_B", B.clone())
        else:
            # All matrices as one, so that the bound follows from the width of the input alone.
            nn.init.kaiming_uniform_(A.flatten(0, -2), a=math.sqrt(5))
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [O, I] in the weight's dtype; the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        value = weight.float()
        return put_rows(value, self.rows, take_rows(value, self.rows) + self.change()).to(weight.dtype)

    def change(self) -> torch.Tensor:
        """Return the change of the site's rows, [R, I] fp32."""
        A = self.lora_A
        kept = None
        if self.training and self.dropout:
            kept = F.dropout(torch.ones_like(A[..., :1]), self.dropout)
        product = self.lora_B @ (A if kept is None else A * kept)
        if "start_A" in self._buffers:
            start_A = self.get_buffer("start_A")
            product = product - self.get_buffer("start_B") @ (start_A if kept is None else start_A * kept)
        return self.scale * product

    def trained(self) -> dict[str, nn.Parameter]:
        """Both factors."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of each row, [*, 1]; a row of zeros has the smallest normal number instead."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return norms.clamp_min(torch.finfo(weight.dtype).tiny)


class Decomposed(nn.Module):
    """The effective tensor is m (W + s B A) / |W + s B A| on the rows of the site: the norm is of a row, and detached.

    m [R, 1] starts at the norms of W, so that the effective tensor starts at W to the bit.
    """

    enabled = True

    def __init__(self, weight: torch.Tensor, rows: Rows, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.rows = rows
        self.product = LowRank(weight, rows, rank=rank, scale=scale, dropout=dropout)
        site = take_rows(weight.detach().float(), rows)
        self.lora_magnitude = nn.Parameter(row_norms(site).cpu())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [O, I] in the weight's dtype; the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        value = weight.float()
        site = decomposed(take_rows(value, self.rows) + self.product.change(), self.lora_magnitude)
        return put_rows(value, self.rows, site).to(weight.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """Both factors and the magnitudes."""
        return {**self.product.trained(), "lora_magnitude": self.lora_magnitude}


def decomposed(direction: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return `direction` [*, I] with rows of the norms `magnitude` [*, 1]; no gradient goes through its own norms."""
    return direction * (magnitude / row_norms(direction.detach()))


class Scaled(nn.Module):
    """The effective tensor is s (W D) + B A on the rows of the site; D [I, I] is block-diagonal, s [R, 1].

    D is the identity minus blocks [K, b, b] that start at zero, s starts at one and B at zero, so that the effective
    tensor starts at W to the bit. Where b does not divide I the last block is cut.
    """

    enabled = True

    def __init__(self, weight: torch.Tensor, rows: Rows, *, rank: int, scale: float, block: int) -> None:
        super().__init__()
        self.rows = rows
        self.product = LowRank(weight, rows, rank=rank, scale=scale, dropout=0.0)
        num_out, num_in = take_rows(weight, rows).shape
        block = min(block, num_in)
        whole, rest = divmod(num_in, block)
        self.lora_blocks = nn.Parameter(torch.zeros(whole, block, block))
        self.lora_rest = nn.Parameter(torch.zeros(rest, rest)) if rest else None
        self.lora_scale = nn.Parameter(torch.ones(num_out, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [O, I] in the weight's dtype; the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        value = weight.float()
        site = take_rows(value, self.rows)
        num_blocks, block, _ = self.lora_blocks.shape
        whole = site[:, : num_blocks * block].reshape(-1, num_blocks, block)
        pieces = [torch.einsum("okb,kbc->okc", whole, self.lora_blocks).flatten(1)]
        if self.lora_rest is not None:
            pieces.append(site[:, num_blocks * block :] @ self.lora_rest)
        changed = self.lora_scale * (site - torch.cat(pieces, dim=1)) + self.product.change()
        return put_rows(value, self.rows, changed).to(weight.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """Both factors, the blocks and the scales."""
        rest = {} if self.lora_rest is None else {"lora_rest": self.lora_rest}
        return {**self.product.trained(), "lora_blocks": self.lora_blocks, **rest, "lora_scale": self.lora_scale}
