"""xLSTM's matrix memory (mLSTM) in plain PyTorch, chunk by chunk.

Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", NeurIPS 2024, equations 19-27 and appendix A.
C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,  h_t = q_t C_t / max(|q_t n_t|, 1)
with f = sigmoid(fgate), i = exp(igate) and q scaled by K^-0.5. C and n are held times exp(-m), where m is the largest
exponent so far; the published model adds `eps` to the denominator in that unit, so m belongs to the function.

Dimensions: B batch, H heads, T time, K width of queries and keys, V width of values; S, L steps of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.ops.precision import outside_autocast

CHUNK_SIZE = 64
"""Steps that are compared with each other directly: a chunk holds H * 64 * 64 weights, and one K * V state per head."""

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The memory C [B, H, K, V], the normaliser n [B, H, K] and the exponent m [B, H, 1]."""


@outside_autocast
def mlstm(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    igate_BHT: torch.Tensor,
    fgate_BHT: torch.Tensor,
    *,
    initial_state: State | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    offset_HKV: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, State]:
    """Return outputs [B, H, T, V] in the dtype of `q_BHTK`, and the final state in fp32 (fp64 for fp64 inputs).

    The gates are given before their activation. Everything is fp32 (or fp64), differentiable in all tensors but m,
    which is a unit and carries no gradient. The state before the first step is zero, m included, unless given.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 leaves the state alone.
    `offset_HKV` is added to C wherever it is read, and not to the state.
    """
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    q, k, v = q_BHTK.to(dtype) * q_BHTK.shape[-1] ** -0.5, k_BHTK.to(dtype), v_BHTV.to(dtype)
    write, log_keep = _log_gates(igate_BHT.to(dtype), fgate_BHT.to(dtype), padding_mask)
    documents = None if seq_idx is None else seq_idx[:, None].expand_as(write)
    memory, normaliser, unit = _zero_state(k, v) if initial_state is None else initial_state
    state = memory.to(dtype), normaliser.to(dtype), unit.to(dtype)
    offset = None if offset_HKV is None else offset_HKV.to(dtype)
    outputs, previous = [], None
    for start in range(0, q.shape[2], CHUNK_SIZE):
        now = slice(start, start + CHUNK_SIZE)
        here = None if documents is None else documents[..., now]
        h, state = _chunk(
            q[:, :, now],
            k[:, :, now],
            v[:, :, now],
            write[..., now],
            log_keep[..., now],
            state,
            here,
            previous,
            offset,
            eps,
        )
        outputs.append(h)
        previous = None if here is None else here[..., -1:]
    return torch.cat(outputs, dim=2).to(q_BHTK.dtype), state


def _log_gates(
    igate: torch.Tensor, fgate: torch.Tensor, padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logs of the input and forget gate, [B, H, T]; a padded step writes nothing and keeps everything."""
    log_keep = F.logsigmoid(fgate)
    if padding_mask is None:
        return igate, log_keep
    padded = ~padding_mask.bool()[:, None]
    return igate.masked_fill(padded, -torch.inf), log_keep.masked_fill(padded, 0.0)


def _zero_state(k_BHTK: torch.Tensor, v_BHTV: torch.Tensor) -> State:
    batch, heads, _, width = k_BHTK.shape
    zeros = k_BHTK.new_zeros
    return zeros(batch, heads, width, v_BHTV.shape[-1]), zeros(batch, heads, width), zeros(batch, heads, 1)


def _chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    write: torch.Tensor,
    log_keep: torch.Tensor,
    state: State,
    documents: torch.Tensor | None,
    previous: torch.Tensor | None,
    offset: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, State]:
    """Outputs of one chunk and the state after it; `documents` [B, H, S], of the step before the chunk in `previous`."""
    memory, normaliser, unit = state
    total = log_keep.cumsum(-1)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    hidden, entering, reach_of_state = future, total + unit, None
    if documents is not None:
        before = documents[..., :1] if previous is None else previous
        resets = torch.diff(documents, prepend=before, dim=-1) != 0
        hidden = future | (documents[..., :, None] != documents[..., None, :])
        # The last reset up to each step; the exponent of what it leaves, nothing, is zero before that step.
        start = torch.where(resets, torch.arange(q.shape[2], device=q.device), 0).cummax(-1).values
        reach_of_state = resets.cumsum(-1) == 0
        entering = torch.where(reach_of_state, entering, total - (total - log_keep).gather(-1, start))
    # Exponents of what step s wrote, as read at step l, and of the entering state; m makes the largest of them zero.
    weights = (total[..., :, None] - total[..., None, :] + write[..., None, :]).masked_fill(hidden, -torch.inf)
    m_BHS = torch.maximum(entering, weights.amax(-1)).detach()
    weights = torch.exp(weights - m_BHS[..., :, None])
    entering = torch.exp(entering - m_BHS)
    entering = entering if reach_of_state is None else entering * reach_of_state

    scores = (q @ k.transpose(-1, -2)) * weights
    numerator = scores @ v + entering[..., None] * (q @ memory)
    if offset is not None:
        numerator = numerator + torch.exp(-m_BHS)[..., None] * (q @ offset)
    reach = scores.sum(-1) + entering * (q @ normaliser[..., None])[..., 0]
    h = numerator / (torch.maximum(reach.abs(), torch.exp(-m_BHS)) + eps)[..., None]
    last = weights[..., -1, :, None] * k
    memory = entering[..., -1, None, None] * memory + last.transpose(-1, -2) @ v
    normaliser = entering[..., -1, None] * normaliser + last.sum(-2)
    return h, (memory, normaliser, m_BHS[..., -1:])


def mlstm_recurrence(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTV: torch.Tensor,
    igate_BHT: torch.Tensor,
    fgate_BHT: torch.Tensor,
    *,
    initial_state: State | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    offset_HKV: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, State]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    memory, normaliser, m = _zero_state(k_BHTK, v_BHTV) if initial_state is None else initial_state
    m, outputs = m[..., 0], []
    for t in range(q_BHTK.shape[2]):
        if seq_idx is not None and t > 0:
            same = (seq_idx[:, t] == seq_idx[:, t - 1])[:, None]
            memory, normaliser, m = memory * same[..., None, None], normaliser * same[..., None], m * same
        q, k, v = q_BHTK[:, :, t] * q_BHTK.shape[-1] ** -0.5, k_BHTK[:, :, t], v_BHTV[:, :, t]
        real = torch.ones_like(m[:, :1]).bool() if padding_mask is None else padding_mask[:, t, None].bool()
        log_keep = F.logsigmoid(fgate_BHT[:, :, t])
        next_m = torch.where(real, torch.maximum(m + log_keep, igate_BHT[:, :, t]), m).detach()
        keep = torch.where(real, torch.exp(m + log_keep - next_m), 1.0)
        write = torch.where(real, torch.exp(igate_BHT[:, :, t] - next_m), 0.0)
        memory = keep[..., None, None] * memory + write[..., None, None] * k[..., :, None] * v[..., None, :]
        normaliser, m = keep[..., None] * normaliser + write[..., None] * k, next_m
        reach = torch.maximum((q * normaliser).sum(-1).abs(), torch.exp(-m)) + eps
        read = memory if offset_HKV is None else memory + torch.exp(-m)[..., None, None] * offset_HKV
        outputs.append((q[..., None, :] @ read)[..., 0, :] / reach[..., None])
    return torch.stack(outputs, dim=2), (memory, normaliser, m[..., None])
