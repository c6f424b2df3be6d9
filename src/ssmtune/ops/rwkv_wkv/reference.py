"""RWKV-4's weighted key-value average (WKV) in plain PyTorch.

Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", EMNLP 2023, equation 16 and appendix D.
o_t = (N_{t-1} + exp(u + k_t) v_t) / (M_{t-1} + exp(u + k_t)),  N_t = e^w N_{t-1} + exp(k_t) v_t,  M_t likewise with v = 1.

N and M are held as num * exp(top) and den * exp(top), with `top` the largest exponent so far, so nothing overflows.
Dimensions: B batch, T time, D channels; the state [3, B, D] is (num, den, top).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.ops.linear_scan import linear_scan
from ssmtune.ops.precision import outside_autocast

EMPTY = -1e38
"""The exponent of an empty state: finite, so that differences of two are."""


@outside_autocast
def rwkv_wkv(
    time_decay_D: torch.Tensor,
    time_first_D: torch.Tensor,
    k_BTD: torch.Tensor,
    v_BTD: torch.Tensor,
    *,
    initial_state_3BD: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, D] in the dtype of `k_BTD` and the final state [3, B, D] in fp32 (fp64 for fp64 inputs).

    The log decay a step is w = -exp(time_decay); u is `time_first_D`. Everything is fp32 (or fp64) and differentiable
    once in all tensors. Of the final state num and den carry the gradient, `top` is a unit and carries none.
    `seq_idx` [B, T]: the state is emptied where it changes; `initial_state_3BD` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 leaves the state alone.
    """
    dtype = torch.promote_types(k_BTD.dtype, torch.float32)
    k, v = k_BTD.to(dtype).transpose(0, 1), v_BTD.to(dtype).transpose(0, 1)
    log_decay = -torch.exp(time_decay_D.to(dtype)).expand(k.shape)
    stored = k
    if padding_mask is not None:
        real = padding_mask.t()[..., None].bool()
        log_decay, stored = log_decay * real, k.masked_fill(~real, -torch.inf)
    state = _empty_state(k[0]) if initial_state_3BD is None else initial_state_3BD.to(dtype)
    resets = None if seq_idx is None else F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).t()[..., None]

    top = _running_top(log_decay.detach(), stored.detach(), state[2].detach(), resets)
    top_before = torch.cat([state[2:], top[:-1]])
    decay = torch.exp(log_decay + top_before - top)
    if resets is not None:
        decay, top_before = decay.masked_fill(resets, 0.0), top_before.masked_fill(resets, EMPTY)
    weight = torch.exp(stored - top)
    sums = linear_scan(decay[:, None].expand(-1, 2, -1, -1), torch.stack([weight * v, weight], dim=1), state[:2])

    before = torch.cat([state[None, :2], sums[:-1]])
    unit = torch.maximum(top_before, time_first_D.to(dtype) + k).detach()
    own, share = torch.exp(time_first_D.to(dtype) + k - unit), torch.exp(top_before - unit)
    o = (share * before[:, 0] + own * v) / (share * before[:, 1] + own)
    return o.transpose(0, 1).to(k_BTD.dtype), torch.cat([sums[-1], top[-1:]])


def _empty_state(k_BD: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(k_BD)
    return torch.stack([zero, zero, torch.full_like(k_BD, EMPTY)])


def _running_top(
    log_decay: torch.Tensor, k: torch.Tensor, top_BD: torch.Tensor, resets: torch.Tensor | None
) -> torch.Tensor:
    """The largest exponent in the state after each step, [T, B, D]: a unit, without a gradient."""
    tops = []
    for t in range(k.shape[0]):
        decayed = top_BD + log_decay[t] if resets is None else (top_BD + log_decay[t]).masked_fill(resets[t], EMPTY)
        top_BD = torch.maximum(decayed, k[t])
        tops.append(top_BD)
    return torch.stack(tops)


def rwkv_wkv_recurrence(
    time_decay_D: torch.Tensor,
    time_first_D: torch.Tensor,
    k_BTD: torch.Tensor,
    v_BTD: torch.Tensor,
    *,
    initial_state_3BD: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    w = -torch.exp(time_decay_D)
    num, den, top = (_empty_state(k_BTD[:, 0]) if initial_state_3BD is None else initial_state_3BD).unbind()
    outputs = []
    for t in range(k_BTD.shape[1]):
        k, v = k_BTD[:, t], v_BTD[:, t]
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
            num, den, top = num * same, den * same, torch.where(same, top, EMPTY)
        unit = torch.maximum(top, time_first_D + k).detach()
        own, share = torch.exp(time_first_D + k - unit), torch.exp(top - unit)
        outputs.append((share * num + own * v) / (share * den + own))
        real = torch.ones_like(num[:, :1]) if padding_mask is None else padding_mask[:, t, None]
        next_top = torch.maximum(top + w, k).detach()
        fed, kept = torch.exp(k - next_top), torch.exp(top + w - next_top)
        num = torch.where(real.bool(), kept * num + fed * v, num)
        den = torch.where(real.bool(), kept * den + fed, den)
        top = torch.where(real.bool(), next_top, top)
    return torch.stack(outputs, dim=1), torch.stack([num, den, top])
