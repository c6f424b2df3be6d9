"""What is inside a branch: s_t = A s_{t-1} + b u_t, in modes or by a matrix; where a document starts, from zero.

A conjugate pair of modes takes two neighbouring dimensions, real and imaginary part.
Dimensions: B batch, T time, n order.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ssmtune.ops.documents import DocumentRows
from ssmtune.ops.modal_scan import Backend, dense_states, modal_states

SHORTEST, LONGEST = 1e-4, 0.1
"""Range of the step sizes (Thapliyal 2026)."""


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
