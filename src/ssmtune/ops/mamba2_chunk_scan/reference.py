"""Mamba-2 scan (state-space duality) in plain PyTorch.

Source: Dao and Gu, "Transformers are SSMs", ICML 2024, section 6 (block decomposition) and listing 1.
Per head, with a_t = exp(A dt_t):  S_t = a_t S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t.

Dimensions: B batch, T time, H heads, P head width, G groups (B and C are shared by H/G heads), N state size,
c chunks, l and s positions inside a chunk, R = H/G heads of a group.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ssmtune.ops.precision import outside_autocast

CHUNK_SIZE = 64
"""Steps per block. The quadratic term costs T*CHUNK_SIZE, the states T/CHUNK_SIZE; 64 was fastest on a CPU."""


@outside_autocast
def mamba2_chunk_scan(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    *,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    initial_states_BHPN: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, H, P] in the dtype of `x_BTHP` and the final state [B, H, P, N] in fp32 (fp64 for fp64 inputs).

    Everything between is fp32 (or fp64), differentiable in all tensors, the initial state included.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_states_BHPN` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets dt = 0, so it neither decays nor feeds the state.
    """
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    batch, num_steps, num_heads, _ = x_BTHP.shape
    num_groups = B_BTGN.shape[2]
    x, B, C, A = x_BTHP.to(dtype), B_BTGN.to(dtype), C_BTGN.to(dtype), A_H.to(dtype)
    dt = step_sizes(dt_BTH.to(dtype), dt_bias_H, dt_softplus, dt_limit, padding_mask)
    if seq_idx is None:
        seq_idx = torch.zeros(batch, num_steps, dtype=torch.int32, device=x.device)

    # Padded steps at the end have dt = 0 and continue the last document, so the final state passes through them.
    size = min(CHUNK_SIZE, num_steps)
    extra = -num_steps % size
    num_chunks = (num_steps + extra) // size
    dt_log = F.pad(dt * A, (0, 0, 0, extra)).view(batch, num_chunks, size, num_heads)
    dtx = F.pad(x * dt[..., None], (0, 0, 0, 0, 0, extra))
    dtx_BcGRlP = dtx.view(batch, num_chunks, size, num_groups, num_heads // num_groups, -1).permute(0, 1, 3, 4, 2, 5)
    B_BcGlN = F.pad(B, (0, 0, 0, 0, 0, extra)).view(batch, num_chunks, size, num_groups, -1).transpose(2, 3)
    C_BcGlN = F.pad(C, (0, 0, 0, 0, 0, extra)).view(batch, num_chunks, size, num_groups, -1).transpose(2, 3)
    document = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, extra)], dim=1).view(batch, num_chunks, size)

    # Running sums in fp64: a mild decay after strong ones is a small difference of two large sums.
    log_decay = dt_log.double().cumsum(dim=2).transpose(2, 3).reshape(batch, num_chunks, num_groups, -1, size)
    y = _within_chunks(dtx_BcGRlP, B_BcGlN, C_BcGlN, log_decay, document)
    chunk_states = _chunk_states(dtx_BcGRlP, B_BcGlN, log_decay, document)
    initial = None
    if initial_states_BHPN is not None:
        initial = initial_states_BHPN.to(dtype).view(
            batch, num_groups, num_heads // num_groups, *initial_states_BHPN.shape[2:]
        )
    entering, final = _pass_states(chunk_states, log_decay[..., -1], document, initial)

    # What each position reads of the state that entered its chunk.
    last_before = torch.cat([document[:, :1, 0], document[:, :-1, -1]], dim=1)
    continues = document == last_before[..., None]
    weight = torch.exp(log_decay.to(dtype).masked_fill(~continues[:, :, None, None, :], -math.inf))
    carried = torch.matmul(C_BcGlN[:, :, :, None], entering.transpose(-1, -2)) * weight[..., None]
    y = (y + carried).permute(0, 1, 4, 2, 3, 5).reshape(batch, num_steps + extra, num_heads, -1)[:, :num_steps]
    if D_H is not None:
        y = y + x * D_H.to(dtype)[:, None]
    return y.to(x_BTHP.dtype), final.reshape(batch, num_heads, *final.shape[3:])


def step_sizes(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the discretisation steps in the dtype of `dt` [B, T, H]: bias, softplus, clamp to `dt_limit`, zero at padding."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    if padding_mask is not None:
        dt = dt * padding_mask[..., None].to(dt.dtype)
    return dt


def _within_chunks(
    dtx_BcGRlP: torch.Tensor,
    B_BcGlN: torch.Tensor,
    C_BcGlN: torch.Tensor,
    log_decay: torch.Tensor,
    document: torch.Tensor,
) -> torch.Tensor:
    """Outputs due to inputs of the same chunk and document, [B, c, G, R, l, P]."""
    size = document.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
    allowed = causal & (document[..., :, None] == document[..., None, :])
    log_weight = (log_decay[..., :, None] - log_decay[..., None, :]).to(dtx_BcGRlP.dtype)
    weight = torch.exp(log_weight.masked_fill(~allowed[:, :, None, None], -math.inf))
    scores = torch.matmul(C_BcGlN, B_BcGlN.transpose(-1, -2))
    return torch.matmul(scores[:, :, :, None] * weight, dtx_BcGRlP)


def _chunk_states(
    dtx_BcGRlP: torch.Tensor, B_BcGlN: torch.Tensor, log_decay: torch.Tensor, document: torch.Tensor
) -> torch.Tensor:
    """State at the end of each chunk due to that chunk's own inputs, [B, c, G, R, P, N]."""
    survives = document == document[..., -1:]
    log_weight = (
        (log_decay[..., -1:] - log_decay).to(dtx_BcGRlP.dtype).masked_fill(~survives[:, :, None, None, :], -math.inf)
    )
    return torch.matmul((dtx_BcGRlP * torch.exp(log_weight)[..., None]).transpose(-1, -2), B_BcGlN[:, :, :, None])


def _pass_states(
    chunk_states: torch.Tensor, chunk_log_decay: torch.Tensor, document: torch.Tensor, initial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """States entering each chunk, [B, c, G, R, P, N], and the final state.

    One chunk after the other: decays over many chunks taken from running sums would lose the digits that the sums gain.
    """
    last = document[..., -1]
    before = torch.cat([document[:, :1, 0], last[:, :-1]], dim=1)
    decay = torch.exp(chunk_log_decay).to(chunk_states.dtype) * (last == before)[:, :, None, None]
    state = torch.zeros_like(chunk_states[:, 0]) if initial is None else initial
    entering = []
    for own, kept in zip(chunk_states.unbind(1), decay[..., None, None].unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(own, kept, state)
    return torch.stack(entering, dim=1), state


def mamba2_recurrence(
    x_BTHP: torch.Tensor,
    dt_BTH: torch.Tensor,
    A_H: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    *,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    initial_states_BHPN: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    batch, num_steps, num_heads, width = x_BTHP.shape
    repeats = num_heads // B_BTGN.shape[2]
    B_BTHN, C_BTHN = B_BTGN.repeat_interleave(repeats, dim=2), C_BTGN.repeat_interleave(repeats, dim=2)
    dt = step_sizes(dt_BTH, dt_bias_H, dt_softplus, dt_limit, padding_mask)
    state = x_BTHP.new_zeros(batch, num_heads, width, B_BTGN.shape[-1])
    if initial_states_BHPN is not None:
        state = initial_states_BHPN
    outputs = []
    for t in range(num_steps):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = torch.exp(A_H * dt[:, t])[..., None, None]
        state = state * decay + (x_BTHP[:, t] * dt[:, t, :, None])[..., None] * B_BTHN[:, t, :, None, :]
        outputs.append((state * C_BTHN[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D_H is not None:
        y = y + x_BTHP * D_H[:, None]
    return y, state
