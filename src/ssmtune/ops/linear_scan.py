"""h_t = a_t h_{t-1} + b_t for every element by itself: the recurrence inside the RG-LRU and RWKV-4.

Dimensions: T time, first; c chunks, l steps of a chunk; the rest of the shape is free.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def linear_scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Return the states after each step, of the shape [T, ...] of `a` and `b`; `initial` is the state before the first.

    `a` lies within the unit circle: products of it are formed, never divided by. Differentiable once in all three.
    """
    states: torch.Tensor = _LinearScan.apply(a, b, initial)  # type: ignore[no-untyped-call]
    return states


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        states = _scan(a, b, initial)
        ctx.save_for_backward(a, states, initial)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, states, initial = ctx.saved_tensors
        # The same recurrence in reverse: a state receives what its output reads and a share of the next one's gradient.
        a = a.conj()
        later = torch.cat([torch.zeros_like(a[:1]), a.flip(0)[:-1]])
        grad = _scan(later, grad_states.flip(0), torch.zeros_like(initial)).flip(0)
        before = torch.cat([initial[None], states[:-1]])
        return grad * before.conj(), grad, a[0] * grad[0]


def _scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """About sqrt(T) steps inside all chunks at once, each from zero, then as many from chunk to chunk."""
    num_steps = a.shape[0]
    size = math.isqrt(num_steps - 1) + 1
    extra = -num_steps % size
    a, b = (F.pad(x, (*[0, 0] * (x.dim() - 1), 0, extra)).view(-1, size, *x.shape[1:]) for x in (a, b))
    states, reach = b.clone(), a.clone()
    steps, decays = states.unbind(1), reach.unbind(1)
    for step in range(1, size):
        steps[step].addcmul_(decays[step], steps[step - 1])
        decays[step].mul_(decays[step - 1])
    entering = [initial]
    for last, decay in zip(states[:-1, -1].unbind(), reach[:-1, -1].unbind(), strict=True):
        entering.append(torch.addcmul(last, decay, entering[-1]))
    return states.addcmul_(reach, torch.stack(entering)[:, None]).flatten(0, 1)[:num_steps]
