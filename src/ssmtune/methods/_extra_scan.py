"""Further states of a selective scan: how they decay, and the projections that write and read them.

Dims: D inner channels, N states of the base, n further ones, G groups, C model width (Mamba-2), K taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

DecayStart = Literal["continue", "copy_last", "copy_first"]


class Mamba1Scan(nn.Module):
    """n further states of each channel: decay A [D, n], and B and C as further rows of x_proj.

    C starts at zero, so that nothing is read out. With "continue" the decays go on as S4D-real's, A = -(N+1) .. -(N+n);
    with the copies they are the last (or first) state's of the base, times exp(`scan_A`), which starts at zero.
    """

    enabled = True

    def __init__(self, shape: Sequence[int], *, num_states: int, decay: DecayStart) -> None:
        super().__init__()
        channels, base_states = shape
        self.num_states, self.decay, self.groups = num_states, decay, 1
        start = torch.zeros(channels, num_states)
        if decay == "continue":
            start = start + torch.log(torch.arange(base_states + 1, base_states + num_states + 1))
        self.scan_A = nn.Parameter(start)
        self.scan_B = _kaiming(num_states, channels)
        self.scan_C = nn.Parameter(torch.zeros(num_states, channels))

    def A(self, A_DN: torch.Tensor) -> torch.Tensor:
        """Return the decays [D, n], fp32, negative; `A_DN` are the base's."""
        if self.decay == "continue":
            return -torch.exp(self.scan_A)
        return (A_DN[:, -1:] if self.decay == "copy_last" else A_DN[:, :1]) * torch.exp(self.scan_A)

    def B(self, x_D: torch.Tensor) -> torch.Tensor:
        """Return what writes the states, [..., n], from the convolved input [..., D]."""
        return F.linear(x_D, self.scan_B.to(x_D.dtype))

    def C(self, x_D: torch.Tensor) -> torch.Tensor:
        """Return what reads the states, [..., n], from the convolved input [..., D]."""
        return F.linear(x_D, self.scan_C.to(x_D.dtype))

    def rows(self) -> dict[str, torch.Tensor]:
        """Return the rows that a model with these states has more, by the role of the rows before them."""
        return {"ssm.x_proj.B": self.scan_B, "ssm.x_proj.C": self.scan_C}

    def trained(self) -> dict[str, nn.Parameter]:
        """Decays and both projections."""
        return dict(self.named_parameters())


class Mamba2Scan(nn.Module):
    """n further states of each head: rows of in_proj and channels of the convolution for B and C of every group.

    They decay as their head does. The rows of C and its convolution's bias start at zero, so that nothing is read out.
    Channels are group by group: first all of B, then all of C.
    """

    enabled = True

    def __init__(self, shape: Sequence[int], *, num_states: int) -> None:
        super().__init__()
        groups, width, taps, has_bias = shape
        rows = groups * num_states
        self.num_states, self.groups = num_states, groups
        self.scan_B = _kaiming(rows, width)
        self.scan_C = nn.Parameter(torch.zeros(rows, width))
        self.scan_conv = nn.Parameter(torch.empty(2 * rows, taps).uniform_(-1 / math.sqrt(taps), 1 / math.sqrt(taps)))
        self.scan_bias = nn.Parameter(torch.zeros(2 * rows)) if has_bias else None

    def inputs(self, hidden_BTC: torch.Tensor) -> torch.Tensor:
        """Return what the convolution is given, [B, 2 G n, T]."""
        weight = torch.cat([self.scan_B, self.scan_C])
        return F.linear(hidden_BTC, weight.to(hidden_BTC.dtype)).transpose(1, 2)

    def split(self, convolved_BRT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B and C, each [B, T, G, n], from the convolution's output [B, 2 G n, T]."""
        batch, _, num_steps = convolved_BRT.shape
        split = convolved_BRT.transpose(1, 2).reshape(batch, num_steps, 2, self.groups, self.num_states)
        return split[:, :, 0], split[:, :, 1]

    def rows(self) -> dict[str, torch.Tensor]:
        """Return the rows that a model with these states has more, by the role of the rows before them."""
        conv_B, conv_C = self.scan_conv[:, None].chunk(2)
        rows = {"ssm.in.B": self.scan_B, "ssm.in.C": self.scan_C, "ssm.conv.B": conv_B, "ssm.conv.C": conv_C}
        zeros = self.scan_B.new_zeros(len(self.scan_B))
        rows |= {"ssm.in.B.bias": zeros, "ssm.in.C.bias": zeros}
        if self.scan_bias is not None:
            rows["ssm.conv.B.bias"], rows["ssm.conv.C.bias"] = self.scan_bias.chunk(2)
        return rows

    def trained(self) -> dict[str, nn.Parameter]:
        """Rows of the input projection, channels of the convolution and their bias."""
        return dict(self.named_parameters())


def _kaiming(rows: int, columns: int) -> nn.Parameter:
    """A linear's own start: Kaiming uniform with a = sqrt 5."""
    weight = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight
