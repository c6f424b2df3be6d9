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

from ssmtune.ops.documents import DocumentRows
from ssmtune.ops.modal_scan import Backend, dense_states, modal_states

SHORTEST, LONGEST = 1e-4, 0.1
"""Range of the step sizes (Thapliyal 2026)."""


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


def _starts(seq_idx: torch.Tensor | None) -> torch.Tensor | None:
    """Where a document begins inside a row, [B, T]."""
    return None if seq_idx is None else torch.diff(seq_idx, prepend=seq_idx[:, :1], dim=1) != 0


def _run(
    modes: torch.Tensor,
    inputs: torch.Tensor,
    starts: torch.Tensor | None,
    entering: torch.Tensor | None,
    backend: Backend,
) -> torch.Tensor:
    """States of real or complex modes; inputs, `entering` and the result hold real numbers, two for a complex one."""
    if not modes.is_complex():
        return modal_states(modes, inputs, entering, starts, backend=backend)
    before = None if entering is None else _paired(entering)
    return torch.view_as_real(modal_states(modes, _paired(inputs), before, starts, backend=backend)).flatten(-2)


def _paired(x: torch.Tensor) -> torch.Tensor:
    """[..., 2 m] real numbers as [..., m] complex ones."""
    return torch.complex(*x.reshape(*x.shape[:-1], -1, 2).unbind(-1))


def as_matrix(modes: torch.Tensor) -> torch.Tensor:
    """The matrix that multiplies by real or complex modes: diagonal, or with a block [[re, -im], [im, re]] for each pair."""
    if not modes.is_complex():
        return modes.diag()
    real, imag = modes.real, modes.imag
    blocks: torch.Tensor = torch.block_diag(*torch.stack([real, -imag, imag, real], -1).view(-1, 2, 2))  # type: ignore[no-untyped-call]
    return blocks


class ContinuousModes(nn.Module):
    """n modes of a continuous system, discretised by zero-order hold: decay exp(dt a), input scaled by (decay - 1) / a.

    Real: a = -exp(log_A), from -1 to -n (S4D-real). Complex: a = -exp(log_A) + i imag_A, one for each conjugate pair, from
    -1/2 + i pi k (S4D-Lin). The step size is bounded smoothly, on a log scale from 1e-4 to 0.1, so that no mode can reach
    a bound and lose its gradient.
    """

    def __init__(self, order: int, *, complex_modes: bool, backend: Backend) -> None:
        super().__init__()
        num = order // 2 if complex_modes else order
        k = torch.arange(1, num + 1, dtype=torch.float32)
        self.log_A = nn.Parameter(torch.full((num,), math.log(0.5)) if complex_modes else k.log())
        if complex_modes:
            self.imag_A = nn.Parameter(math.pi * (k - 1))
        self.complex_modes, self.backend = complex_modes, backend
        # Uniform in the logarithm of the step size; the edges are where the logit has no value.
        self.logit_dt = nn.Parameter(torch.logit(torch.rand(num), eps=1e-3))

    def discretise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (decays, factors of the inputs), each [n] real, or [n / 2] complex."""
        span = math.log(LONGEST / SHORTEST)
        dt = SHORTEST * (span * torch.sigmoid(self.logit_dt)).exp()
        a = -self.log_A.exp()
        if self.complex_modes:
            a = torch.complex(a, self.imag_A)
        decays = (dt * a).exp()
        if self.complex_modes:
            return decays, (decays - 1) / a
        return decays, torch.expm1(dt * a) / a

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and the matrix in front of B, both [n, n], as one step of the system applies them."""
        decays, factors = self.discretise()
        return as_matrix(decays), as_matrix(factors)

    def forward(
        self, inputs: torch.Tensor, seq_idx: torch.Tensor | None, entering: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the states [B, T, n] of the inputs [B, T, n]."""
        decays, factors = self.discretise()
        if self.complex_modes:
            inputs = torch.view_as_real(_paired(inputs) * factors).flatten(-2)
        else:
            inputs = inputs * factors
        return _run(decays, inputs, _starts(seq_idx), entering, self.backend)


class DiscreteModes(nn.Module):
    """Modes as they are stepped: real ones tanh(real), and pairs tanh(radius) exp(+-i angle), all inside the unit circle."""

    def __init__(self, num_real: int, num_pairs: int) -> None:
        super().__init__()
        self.num_real, self.num_pairs = num_real, num_pairs
        # Apart from each other and away from zero, where an angle means nothing; truncation puts its own values here.
        # No parameter without elements: nothing could tell it from one that gets no gradient.
        if num_real:
            self.real = nn.Parameter(torch.linspace(0.5, 2, num_real))
        if num_pairs:
            self.radius = nn.Parameter(torch.full((num_pairs,), 1.0))
            self.angle = nn.Parameter(math.pi * torch.arange(1, num_pairs + 1) / (num_pairs + 1))

    def modes(self) -> list[torch.Tensor]:
        """Return the real modes and one of each conjugate pair, without those that there are none of."""
        real = [self.real.tanh()] if self.num_real else []
        return real + ([torch.polar(self.radius.tanh(), self.angle)] if self.num_pairs else [])

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and the matrix in front of B, the identity, both [n, n]."""
        A = torch.block_diag(*map(as_matrix, self.modes()))  # type: ignore[no-untyped-call]
        return A, torch.eye(len(A), dtype=A.dtype)

    def forward(
        self, inputs: torch.Tensor, seq_idx: torch.Tensor | None, entering: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the states [B, T, n] of the inputs [B, T, n]: real modes first, then the pairs."""
        starts, parts = _starts(seq_idx), []
        for modes in self.modes():
            own = slice(self.num_real, None) if modes.is_complex() else slice(0, self.num_real)
            before = None if entering is None else entering[..., own]
            parts.append(_run(modes, inputs[..., own], starts, before, "fft"))
        return torch.cat(parts, -1)


class DenseDynamics(nn.Module):
    """A quasi-triangular matrix, for a system whose modes are too close to each other to be told apart."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(order, order))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and the matrix in front of B, the identity, both [n, n]."""
        return self.A, torch.eye(len(self.A), dtype=self.A.dtype)

    def forward(
        self, inputs: torch.Tensor, seq_idx: torch.Tensor | None, entering: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the states [B, T, n] of the inputs [B, T, n]."""
        starts = _starts(seq_idx)
        if starts is None:
            return dense_states(self.A, inputs, entering)
        # Document by document: no entry of A can be switched off for one step, as a mode's decay can.
        assert seq_idx is not None
        documents = DocumentRows(seq_idx)
        return documents.join(dense_states(self.A, documents.split(inputs)))
