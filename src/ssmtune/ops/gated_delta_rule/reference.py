"""Gated delta rule in plain PyTorch, for one decay per head (Gated DeltaNet) or one per key channel (KDA).

Sources: Yang, Kautz and Hatamizadeh, "Gated Delta Networks", ICLR 2025 (chunks by the WY representation);
Kimi Team, "Kimi Linear", 2025 (decay per channel).
Per head:  S = exp(g_t) S_{t-1},  S_t = S + k_t (beta_t (v_t - S^T k_t))^T,  o_t = scale S_t^T q_t.

Dimensions: B batch, T time, H value heads, K key width, V value width, c chunks, l and s positions inside a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.errors import ConfigError
from ssmtune.ops.precision import outside_autocast

CHUNK_SIZE, CHUNK_SIZE_ON_CPU = 64, 32
"""Steps per block, powers of two. On a CPU the products inside a block cost more than the loop over blocks: 32 was faster
there than 64, and 16 no faster; a GPU waits for the loop."""

NORM_EPS = 1e-6
"""Added to the squared length of q and k before they are normalised, as the published models do."""


@outside_autocast
def gated_delta_rule(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state_BHKV: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, H, V] in the dtype of `q_BTHK` and the final state [B, H, K, V] in fp32 (fp64 for fp64 inputs).

    `g` is the log decay, at most 0: [B, T, H], or [B, T, H, K] for a decay per key channel. `beta_BTH` may exceed 1.
    q and k may have fewer heads than v: each serves H / heads consecutive value heads. `scale` is K**-0.5 by default;
    `qk_l2norm` divides q and k by their lengths first. Everything is fp32 (or fp64) and differentiable in all tensors.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state_BHKV` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets g = 0 and beta = 0, so it leaves the state alone.
    Raises `ConfigError` when the heads of q do not divide those of v.
    """
    dtype = torch.promote_types(q_BTHK.dtype, torch.float32)
    batch, num_steps, num_heads, _ = v_BTHV.shape
    q, k = queries_and_keys(q_BTHK.to(dtype), k_BTHK.to(dtype), num_heads, scale, qk_l2norm)
    v, beta = v_BTHV.to(dtype), beta_BTH.to(dtype)
    g = g.to(dtype) if g.dim() == 4 else g.to(dtype)[..., None]
    if padding_mask is not None:
        mask = padding_mask.to(dtype)[:, :, None]
        beta, g = beta * mask, g * mask[..., None]
    if seq_idx is None:
        seq_idx = torch.zeros(batch, num_steps, dtype=torch.int32, device=q.device)

    # Steps added at the end have g = beta = 0 and continue the last document, so the final state passes through them.
    size = min(CHUNK_SIZE_ON_CPU if q.device.type == "cpu" else CHUNK_SIZE, 1 << (num_steps - 1).bit_length())
    extra = -num_steps % size
    q, k, v, g, beta = (_in_chunks(x, size, extra) for x in (q, k, v, g, beta[..., None]))
    document = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, extra)], dim=1).view(batch, 1, -1, size)
    last_before = torch.cat([document[:, :, :1, 0], document[:, :, :-1, -1]], dim=2)
    continues = (document == last_before[..., None])[..., None]
    survives = (document == document[..., -1:])[..., None]

    # Within a chunk the updates solve (I + L) U = beta v and (I + L) W = beta k, where L couples a step to earlier ones.
    from_start = torch.exp(g.cumsum(dim=-2)) * continues
    to_end = torch.exp(_sum_after(g)) * survives
    same_document = document[..., :, None] == document[..., None, :]
    k_beta = k * beta
    reads, couplings = _decayed_scores(q, k_beta, k, g, same_document)
    right = torch.cat([v * beta, k_beta * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(couplings, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    state = _zero_state(k, v) if initial_state_BHKV is None else initial_state_BHKV.to(dtype)
    chunk_decay = from_start[..., -1, :, None]
    entering, written = [], []
    for k_end, u_c, w_c, decay in zip(
        (k * to_end).transpose(-1, -2).unbind(2), u.unbind(2), w.unbind(2), chunk_decay.unbind(2), strict=True
    ):
        entering.append(state)
        written.append(u_c - w_c @ state)
        state = decay * state + k_end @ written[-1]
    o = reads @ torch.stack(written, dim=2) + (q * from_start) @ torch.stack(entering, dim=2)
    o = o.flatten(2, 3)[:, :, :num_steps].transpose(1, 2)
    return o.to(q_BTHK.dtype), state


def queries_and_keys(
    q: torch.Tensor, k: torch.Tensor, num_heads: int, scale: float | None, qk_l2norm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k [..., H, K] as the recurrence reads them: normalised, scaled, repeated for the value heads."""
    if num_heads % q.shape[-2]:
        raise ConfigError(
            f"gated_delta_rule: q and k have {q.shape[-2]} heads and v has {num_heads}; "
            "each head of q must serve the same number of heads of v. Check the config's numbers of heads."
        )
    if qk_l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    repeats = num_heads // q.shape[-2]
    return (q, k) if repeats == 1 else (q.repeat_interleave(repeats, dim=-2), k.repeat_interleave(repeats, dim=-2))


def _in_chunks(x_BTHX: torch.Tensor, size: int, extra: int) -> torch.Tensor:
    """[B, H, c, l, X], zero in the added steps."""
    x_BHTX = F.pad(x_BTHX, (0, 0, 0, 0, 0, extra)).transpose(1, 2)
    return x_BHTX.reshape(*x_BHTX.shape[:2], -1, size, x_BHTX.shape[-1])


def _zero_state(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def _sum_after(g: torch.Tensor) -> torch.Tensor:
    """Sum of `g` over the later positions of dimension -2, without the cancellation of total minus cumulated sum."""
    return F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _decayed_scores(
    q: torch.Tensor, k_beta: torch.Tensor, k: torch.Tensor, g: torch.Tensor, same_document: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """sum_K x_l k_s exp(g_{s+1} + ... + g_l) for s <= l of one document, else 0: [B, H, c, l, s] for x = q, k_beta."""
    size = k.shape[-2]
    if g.shape[-1] == 1:
        # Each sum is taken by itself: a difference of running sums would lose a mild decay after a strong one.
        now_or_later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu()
        log_decay = g.expand(*g.shape[:-1], size).masked_fill(now_or_later, 0.0).cumsum(-2)
        decay = torch.exp(log_decay.masked_fill(now_or_later.triu(1) | ~same_document, -torch.inf))
        return (q @ k.mT) * decay, (k_beta @ k.mT) * decay
    # A decay per channel does not factor out of the product. Between the two halves of a block it does, cut at the
    # middle: both factors are decays over some steps, at most 1. So join single steps to pairs, these to fours, ...
    rows, half = torch.stack([q, k_beta]), 1
    scores = (rows * k).sum(-1)[..., None, None]
    while half < size:
        (g_first, g_second), (k_first, _), (_, rows_second) = (_halves(x, half) for x in (g, k, rows))
        between = (rows_second * torch.exp(g_second.cumsum(-2))) @ (k_first * torch.exp(_sum_after(g_first))).mT
        first, second = scores[..., ::2, :, :], scores[..., 1::2, :, :]
        scores = torch.cat([F.pad(first, (0, half)), torch.cat([between, second], dim=-1)], dim=-2)
        half *= 2
    return (scores.squeeze(-3) * same_document).unbind()


def _halves(x: torch.Tensor, half: int) -> tuple[torch.Tensor, ...]:
    """The first and second halves of every block of 2 * half positions, [..., block, half, K] each."""
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1]).unbind(-3)


def gated_delta_rule_recurrence(
    q_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor,
    beta_BTH: torch.Tensor,
    *,
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state_BHKV: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    q, k = queries_and_keys(q_BTHK, k_BTHK, v_BTHV.shape[2], scale, qk_l2norm)
    state = initial_state_BHKV
    if state is None:
        state = _zero_state(k.transpose(1, 2), v_BTHV.transpose(1, 2))
    outputs = []
    for t in range(q.shape[1]):
        beta, decay = beta_BTH[:, t, :, None], torch.exp(g[:, t] if g.dim() == 4 else g[:, t, :, None])
        if padding_mask is not None:
            real = padding_mask[:, t, None, None].bool()
            beta, decay = beta * real, torch.where(real, decay, 1.0)
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        state = state * decay[..., None]
        predicted = (state * k[:, t, ..., None]).sum(-2)
        state = state + k[:, t, ..., None] * (beta * (v_BTHV[:, t] - predicted))[..., None, :]
        outputs.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(outputs, dim=1), state
