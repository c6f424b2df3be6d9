"""s_t = a s_{t-1} + u_t with constant decays: the recurrence of a linear system, mode by mode.

Dimensions: B batch, T time, n modes (real, or complex ones that stand for a conjugate pair each).
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ssmtune.ops.linear_scan import linear_scan

Backend = Literal["fft", "scan"]


def modal_states(
    a_n: torch.Tensor,
    u_BTn: torch.Tensor,
    initial_Bn: torch.Tensor | None = None,
    starts_BT: torch.Tensor | None = None,
    *,
    backend: Backend = "fft",
) -> torch.Tensor:
    """Return the states [B, T, n] after each step, from `initial_Bn` (zero where None); fp32 or complex64, or double.

    `a_n` are the decays, within the unit circle. Where `starts_BT` is true a new document starts, from zero; only the
    scan can do that. "fft" convolves with the powers of `a_n`, padded to twice the length so that nothing wraps around;
    "scan" takes about 2 sqrt(T) steps. Both are exact up to rounding and differentiable in every tensor.
    """
    if u_BTn.shape[1] == 1:
        # One token of generation: no transform, and no state for a step that starts a document.
        return u_BTn if initial_Bn is None else u_BTn + (a_n * initial_Bn)[:, None]
    if backend == "scan" or starts_BT is not None:
        decay_BTn = a_n.expand(u_BTn.shape)
        if starts_BT is not None:
            decay_BTn = decay_BTn.masked_fill(starts_BT[..., None], 0)
        initial = torch.zeros_like(u_BTn[:, 0]) if initial_Bn is None else initial_Bn
        return linear_scan(decay_BTn.transpose(0, 1), u_BTn.transpose(0, 1), initial).transpose(0, 1)
    num_steps = u_BTn.shape[1]
    powers_Tn = _powers(a_n, num_steps)
    states = _convolve(powers_Tn, u_BTn)
    if initial_Bn is not None:
        states = states + (a_n * powers_Tn) * initial_Bn[:, None]
    return states


def _powers(a_n: torch.Tensor, num_steps: int) -> torch.Tensor:
    """a^0 to a^(T-1), [T, n], as products of two powers that are each taken in double precision."""
    size = math.isqrt(num_steps - 1) + 1
    wide = a_n.to(torch.complex128 if a_n.is_complex() else torch.float64)
    ones = torch.ones_like(wide[None])
    within = torch.cat([ones, wide.expand(size - 1, -1)]).cumprod(0)
    across = torch.cat([ones, (within[-1] * wide).expand(-(-num_steps // size) - 1, -1)]).cumprod(0)
    powers: torch.Tensor = (across.to(a_n.dtype)[:, None] * within.to(a_n.dtype)).flatten(0, 1)[:num_steps]
    return powers


def _convolve(kernel_Tn: torch.Tensor, u_BTn: torch.Tensor) -> torch.Tensor:
    """sum_l kernel[l] u[t - l]: linear, since both are padded to a power of two of at least 2 T - 1 steps."""
    num_steps = u_BTn.shape[1]
    width = 1 << (2 * num_steps - 2).bit_length()
    # Time last: a transform of neighbouring numbers.
    kernel_nT, u_BnT = kernel_Tn.T.contiguous(), u_BTn.transpose(1, 2).contiguous()
    if u_BTn.is_complex():
        product = torch.fft.fft(kernel_nT, width) * torch.fft.fft(u_BnT, width)
        states = torch.fft.ifft(product)
    else:
        states = torch.fft.irfft(torch.fft.rfft(kernel_nT, width) * torch.fft.rfft(u_BnT, width), width)
    states_BTn: torch.Tensor = states[..., :num_steps].transpose(1, 2)
    return states_BTn


def dense_states(A_nn: torch.Tensor, u_BTn: torch.Tensor, initial_Bn: torch.Tensor | None = None) -> torch.Tensor:
    """Return the states [B, T, n] of s_t = A s_{t-1} + u_t for a matrix A that has no well-conditioned modes.

    About sqrt(T) steps inside all chunks at once, and as many from chunk to chunk.
    """
    batch, num_steps, order = u_BTn.shape
    size = math.isqrt(num_steps - 1) + 1
    padded = torch.cat([u_BTn, u_BTn.new_zeros(batch, -num_steps % size, order)], 1).view(batch, -1, size, order)
    within = [padded[:, :, 0]]
    powers = [A_nn.T]
    for step in range(1, size):
        within.append(padded[:, :, step] + within[-1] @ A_nn.T)
        powers.append(powers[-1] @ A_nn.T)
    states = torch.stack(within, 2)
    entering = [u_BTn.new_zeros(batch, order) if initial_Bn is None else initial_Bn]
    for chunk in range(states.shape[1] - 1):
        entering.append(states[:, chunk, -1] + entering[-1] @ powers[-1])
    carried = torch.einsum("bcn,lnm->bclm", torch.stack(entering, 1), torch.stack(powers))
    return (states + carried).flatten(1, 2)[:, :num_steps]
