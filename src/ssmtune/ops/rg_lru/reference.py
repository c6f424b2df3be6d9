"""Real-gated linear recurrent unit in plain PyTorch.

Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention", 2024, equations 1-4.
h_t = a_t h_{t-1} + sqrt(1 - a_t^2) x_t, where x is the gated input; a document's first input enters unscaled.

Dimensions: B batch, T time, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ssmtune.ops.linear_scan import linear_scan
from ssmtune.ops.precision import outside_autocast

MAX_SQRT_GRADIENT = 1000.0
"""The slope of the square root is cut here, as the published model does: at a = 1 it would be infinite."""


@outside_autocast
def rg_lru(
    x_BTD: torch.Tensor,
    log_a_BTD: torch.Tensor,
    *,
    initial_state_BD: torch.Tensor | None = None,
    starts_BT: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states after each step [B, T, D] in the dtype of `x_BTD`, and the last in fp32 (fp64 for fp64 inputs).

    `x_BTD` is the input times its gate, `log_a_BTD` <= 0 the log of the recurrent gate. Everything is fp32 (or fp64),
    differentiable once in all tensors, the initial state included.
    `starts_BT` [B, T]: steps whose input enters with factor 1. By default the first real step of each document, without
    that of the first document when an initial state is given, for then it continues one.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state_BD` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 leaves the state alone.
    """
    dtype = torch.promote_types(x_BTD.dtype, torch.float32)
    x, log_a = x_BTD.to(dtype), log_a_BTD.to(dtype)
    if starts_BT is None:
        starts_BT = _first_real_steps(x_BTD, initial_state_BD is not None, seq_idx, padding_mask)
    gain = _BoundedSqrt.apply(-torch.expm1(2 * log_a))  # type: ignore[no-untyped-call]
    fed = x * torch.where(starts_BT[..., None], 1.0, gain)
    a = torch.exp(log_a)
    if padding_mask is not None:
        real = padding_mask[..., None].bool()
        fed, a = fed * real, torch.where(real, a, 1.0)
    if seq_idx is not None:
        a = a.masked_fill(_resets(seq_idx)[..., None], 0.0)
    initial = torch.zeros_like(x[:, 0]) if initial_state_BD is None else initial_state_BD.to(dtype)
    states_TBD = linear_scan(a.transpose(0, 1), fed.transpose(0, 1), initial)
    return states_TBD.transpose(0, 1).to(x_BTD.dtype), states_TBD[-1]


def _resets(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where a later document begins, [B, T]."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def _first_real_steps(
    x_BTD: torch.Tensor, continues: bool, seq_idx: torch.Tensor | None, padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """The first real step of each document, [B, T]; of the first one only if it does not continue a state."""
    shape, device = x_BTD.shape[:2], x_BTD.device
    real = torch.ones(shape, dtype=torch.bool, device=device) if padding_mask is None else padding_mask.bool()
    resets = torch.zeros(shape, dtype=torch.bool, device=device) if seq_idx is None else _resets(seq_idx)
    seen = real.cumsum(1) - real.long()
    seen_before_document = torch.where(resets, seen, 0).cummax(1).values
    starts = real & (seen == seen_before_document)
    return starts & (resets.cumsum(1) > 0) if continues else starts


class _BoundedSqrt(torch.autograd.Function):
    """The square root with its derivative cut at `MAX_SQRT_GRADIENT`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        root: torch.Tensor = ctx.saved_tensors[0]
        return grad / (2 * root).clamp(min=1 / MAX_SQRT_GRADIENT)


def rg_lru_recurrence(
    x_BTD: torch.Tensor,
    log_a_BTD: torch.Tensor,
    *,
    initial_state_BD: torch.Tensor | None = None,
    starts_BT: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    state = torch.zeros_like(x_BTD[:, 0]) if initial_state_BD is None else initial_state_BD
    begins = torch.full((x_BTD.shape[0], 1), initial_state_BD is None, device=x_BTD.device)
    outputs = []
    for t in range(x_BTD.shape[1]):
        if seq_idx is not None and t > 0:
            changed = (seq_idx[:, t] != seq_idx[:, t - 1])[:, None]
            state, begins = state * ~changed, begins | changed
        real = torch.ones_like(begins) if padding_mask is None else padding_mask[:, t, None].bool()
        starts = begins if starts_BT is None else starts_BT[:, t, None]
        gain = torch.where(starts, 1.0, torch.sqrt(1 - torch.exp(2 * log_a_BTD[:, t])))
        state = torch.where(real, torch.exp(log_a_BTD[:, t]) * state + gain * x_BTD[:, t], state)
        begins = begins & ~real
        outputs.append(state)
    return torch.stack(outputs, dim=1), state
