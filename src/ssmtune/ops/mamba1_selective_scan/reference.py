"""Mamba-1 selective scan in plain PyTorch, without the [B, D, T, N] tensor of all states.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", COLM 2024, algorithm 2.
Per channel:  S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t,  y_t = S_t C_t + D x_t,  gated by silu(z_t).

Dimensions: B batch, D channels, T time, N state size, c chunks, l steps of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ssmtune.ops.precision import outside_autocast

CHUNK_SIZE = 64
"""Steps whose states exist at the same time: 64*D*N numbers per sequence, and T/64 states are kept for the backward."""


@outside_autocast
def mamba1_selective_scan(
    x_BDT: torch.Tensor,
    dt_BDT: torch.Tensor,
    A_DN: torch.Tensor,
    B_BNT: torch.Tensor,
    C_BNT: torch.Tensor,
    *,
    D_D: torch.Tensor | None = None,
    z_BDT: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state_BDN: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, D, T] in the dtype of `x_BDT` and the final state [B, D, N] in fp32 (fp64 for fp64 inputs).

    Everything between is fp32 (or fp64), differentiable once in all tensors, the initial state included.
    `seq_idx` [B, T]: the state is reset to zero where it changes; `initial_state_BDN` belongs to the first document.
    `padding_mask` [B, T]: a step where it is 0 gets dt = 0, so it neither decays nor feeds the state.
    """
    dtype = torch.promote_types(x_BDT.dtype, torch.float32)
    batch, width, num_steps = x_BDT.shape
    x = x_BDT.to(dtype)
    dt = step_sizes(dt_BDT.to(dtype), dt_bias_D, dt_softplus, padding_mask)
    if initial_state_BDN is None:
        initial_state_BDN = x.new_zeros(batch, width, A_DN.shape[1])
    y_TBD, final_BND = _Scan.apply(  # type: ignore[no-untyped-call]
        (x * dt).permute(2, 0, 1),
        dt.permute(2, 0, 1),
        A_DN.to(dtype).t(),
        B_BNT.to(dtype).permute(2, 0, 1),
        C_BNT.to(dtype).permute(2, 0, 1),
        initial_state_BDN.to(dtype).transpose(1, 2),
        None if seq_idx is None else _document_starts(seq_idx).t(),
    )
    y = skip_and_gate(y_TBD.permute(1, 2, 0), x, D_D, z_BDT, dim=1)
    return y.to(x_BDT.dtype), final_BND.transpose(1, 2)


def step_sizes(
    dt: torch.Tensor, dt_bias_D: torch.Tensor | None, dt_softplus: bool, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the discretisation steps [B, D, T]: bias, softplus, zero at padding."""
    if dt_bias_D is not None:
        dt = dt + dt_bias_D.to(dt.dtype)[:, None]
    if dt_softplus:
        dt = F.softplus(dt)
    if padding_mask is not None:
        dt = dt * padding_mask[:, None].to(dt.dtype)
    return dt


def _document_starts(seq_idx: torch.Tensor) -> torch.Tensor:
    """Where a later document begins, [B, T]; the first step continues the initial state."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def skip_and_gate(
    y: torch.Tensor, x: torch.Tensor, D_D: torch.Tensor | None, z: torch.Tensor | None, *, dim: int
) -> torch.Tensor:
    """Return `y` with the skip connection added along the channels `dim`, then gated."""
    if D_D is not None:
        y = y + x * D_D.to(y.dtype).view(-1, *[1] * (y.dim() - dim - 1))
    return y if z is None else y * F.silu(z.to(y.dtype))


class _Scan(torch.autograd.Function):
    """y_t = C_t S_t for S_t = exp(dt_t A) S_{t-1} + (dt x)_t B_t; the backward recomputes the states of one chunk at a time.

    A step is one fused multiply-add of the whole state: no products of decays are formed, hence none is divided by.
    Time comes first and channels last, so that a step is contiguous and the broadcasts over N run along channels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dtx_TBD: torch.Tensor,
        dt_TBD: torch.Tensor,
        A_ND: torch.Tensor,
        B_TBN: torch.Tensor,
        C_TBN: torch.Tensor,
        initial_BND: torch.Tensor,
        starts_TB: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtx_TBD, dt_TBD, A_ND = dtx_TBD.contiguous(), dt_TBD.contiguous(), A_ND.contiguous()
        state, entering, outputs = initial_BND.contiguous(), [], []
        for start in range(0, len(dt_TBD), CHUNK_SIZE):
            now = slice(start, start + CHUNK_SIZE)
            entering.append(state)
            decay = _decays(dt_TBD[now], A_ND, None if starts_TB is None else starts_TB[now])
            states_lBND = _states(decay, dtx_TBD[now], B_TBN[now], state)
            outputs.append(torch.matmul(C_TBN[now].unsqueeze(-2), states_lBND).squeeze(-2))
            state = states_lBND[-1].clone()
        ctx.save_for_backward(dtx_TBD, dt_TBD, A_ND, B_TBN, C_TBN, torch.stack(entering), starts_TB)
        return torch.cat(outputs), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TBD: torch.Tensor, grad_final_BND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dtx_TBD, dt_TBD, A_ND, B_TBN, C_TBN, entering_cBND, starts_TB = ctx.saved_tensors
        grad_y_TBD = grad_y_TBD.contiguous()
        grad_dtx, grad_dt = torch.empty_like(dtx_TBD), torch.empty_like(dt_TBD)
        grad_B, grad_C = torch.empty_like(B_TBN), torch.empty_like(C_TBN)
        grad_A, grad_state = torch.zeros_like(A_ND), grad_final_BND
        for chunk in reversed(range(len(entering_cBND))):
            now = slice(chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE)
            decay = _decays(dt_TBD[now], A_ND, None if starts_TB is None else starts_TB[now])
            states = _states(decay, dtx_TBD[now], B_TBN[now], entering_cBND[chunk])
            grad_C[now] = (states * grad_y_TBD[now].unsqueeze(-2)).sum(-1)
            # The gradient of each state: what its output reads, and what the next state receives of it.
            grad_states = grad_y_TBD[now].unsqueeze(-2) * C_TBN[now].unsqueeze(-1)
            grad_states[-1] += grad_state
            steps, decays = grad_states.unbind(), decay.unbind()
            for step in range(len(steps) - 2, -1, -1):
                steps[step].addcmul_(decays[step + 1], steps[step + 1])
            grad_state = decay[0] * grad_states[0]
            grad_dtx[now] = torch.matmul(B_TBN[now].unsqueeze(-2), grad_states).squeeze(-2)
            grad_B[now] = (grad_states * dtx_TBD[now].unsqueeze(-2)).sum(-1)
            # log decay = dt A, and its gradient is that of the decay times the decay.
            grad_log = grad_states.mul_(decay)
            grad_log[0] *= entering_cBND[chunk]
            grad_log[1:] *= states[:-1]
            grad_A += (grad_log * dt_TBD[now].unsqueeze(-2)).sum((0, 1))
            grad_dt[now] = grad_log.mul_(A_ND).sum(-2)
        return grad_dtx, grad_dt, grad_A, grad_B, grad_C, grad_state, None


def _decays(dt_lBD: torch.Tensor, A_ND: torch.Tensor, starts_lB: torch.Tensor | None) -> torch.Tensor:
    """The decay of each state entering a step, [l, B, N, D]; zero where a document begins."""
    decay = (dt_lBD.unsqueeze(-2) * A_ND).exp_()
    return decay if starts_lB is None else decay.masked_fill_(starts_lB[..., None, None], 0.0)


def _states(
    decay_lBND: torch.Tensor, dtx_lBD: torch.Tensor, B_lBN: torch.Tensor, entering_BND: torch.Tensor
) -> torch.Tensor:
    """The states after each step of a chunk, [l, B, N, D]."""
    states = dtx_lBD.unsqueeze(-2) * B_lBN.unsqueeze(-1)
    previous = entering_BND
    for state, decay in zip(states.unbind(), decay_lBND.unbind(), strict=True):
        previous = state.addcmul_(decay, previous)
    return states


def mamba1_recurrence(
    x_BDT: torch.Tensor,
    dt_BDT: torch.Tensor,
    A_DN: torch.Tensor,
    B_BNT: torch.Tensor,
    C_BNT: torch.Tensor,
    *,
    D_D: torch.Tensor | None = None,
    z_BDT: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
    initial_state_BDN: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function step by step, in the inputs' dtype: the truth that the chunked form is tested against (in fp64)."""
    dt = dt_BDT if dt_bias_D is None else dt_BDT + dt_bias_D[:, None]
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt if padding_mask is None else dt * padding_mask[:, None].to(dt.dtype)
    state = x_BDT.new_zeros(*x_BDT.shape[:2], A_DN.shape[1]) if initial_state_BDN is None else initial_state_BDN
    outputs = []
    for t in range(x_BDT.shape[-1]):
        if seq_idx is not None and t > 0:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        fed = (dt[..., t] * x_BDT[..., t])[..., None] * B_BNT[:, None, :, t]
        state = torch.exp(dt[..., t, None] * A_DN) * state + fed
        outputs.append((state * C_BNT[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D_D is None else y + x_BDT * D_D[:, None]
    return (y if z_BDT is None else y * F.silu(z_BDT)), state
