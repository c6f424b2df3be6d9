"""A trained module beside a block: a rank-n bottleneck whose inside may be a linear system.

y_t = g (C s_t),  s_t = A s_{t-1} + b (B x_t), all of it fp32.
A conjugate pair of modes takes two of the n inner dimensions, real and imaginary part, so that B and C are real.
Dimensions: B batch, T time, D width of the model, n order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Branch(nn.Module):
    """What a block's output is increased by. `dynamics` None is the static adapter, without memory."""

    enabled = True

    def __init__(self, width: int, order: int, dynamics: nn.Module | None, *, gates: int, start: float = 0.0) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.randn(order, width) / math.sqrt(width))
        self.C = nn.Parameter(torch.randn(width, order) / math.sqrt(order))
        self.gate = nn.Parameter(torch.full((gates,), start))
        self.dynamics = dynamics
        self.start = start

    def forward(
        self,
        x_BTD: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        entering_Bn: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is added to the block's output, [B, T, D] fp32, and the state after the last token, [B, n].

        `seq_idx` [B, T] numbers the documents of packed rows, each of which starts from zero; `padding_mask` [B, T] is
        zero at padding, which feeds nothing and moves the state that is handed on only where it lies between tokens.
        """
        # A state that lives for thousands of steps has no room for rounding: fp32 also where the rest is cast down.
        with torch.autocast(x_BTD.device.type, enabled=False):
            states = self.states(x_BTD, seq_idx, padding_mask, entering_Bn)
            final = None if self.dynamics is None else _last(states, padding_mask, entering_Bn)
            return F.linear(states, self.C) * self.gate, final

    def states(
        self,
        x_BTD: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        entering_Bn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the states [B, T, n] after each token, fp32; without dynamics, what B makes of each token."""
        inputs = F.linear(x_BTD.float(), self.B)
        if padding_mask is not None:
            inputs = inputs * padding_mask[..., None]
        return inputs if self.dynamics is None else self.dynamics(inputs, seq_idx, entering_Bn)

    def trained(self) -> dict[str, nn.Parameter]:
        """B, C, the gate, and the numbers of the dynamics."""
        return {name.removeprefix("dynamics."): parameter for name, parameter in self.named_parameters()}


def _last(states_BTn: torch.Tensor, mask_BT: torch.Tensor | None, entering_Bn: torch.Tensor | None) -> torch.Tensor:
    """The state after the last token of each row: padding on the right must not decay it."""
    if mask_BT is None:
        return states_BTn[:, -1]
    steps = torch.arange(1, states_BTn.shape[1] + 1, device=mask_BT.device)
    last = ((mask_BT != 0) * steps).amax(1)
    before = torch.zeros_like(states_BTn[:, 0]) if entering_Bn is None else entering_Bn
    return torch.cat([before[:, None], states_BTn], 1)[torch.arange(len(last), device=last.device), last]
