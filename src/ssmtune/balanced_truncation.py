"""Balanced truncation of linear systems by the square-root method, in double precision.

Source: Laub, Heath, Paige and Ward, IEEE TAC 32(2), 1987 (square-root algorithm); Glover, Int. J. Control 39(6), 1984 (the
bound 2 (sigma_{r+1} + ... + sigma_n) on the error over all frequencies). Everything acts on the system as it is stepped,
s_t = A s_{t-1} + B x_t, y_t = C s_t, so nothing is discretised again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.linalg import schur

from ssmtune.errors import ConfigError


@dataclass(frozen=True)
class System:
    """A real discrete-time system: A [n, n], B [n, m], C [p, n], fp64."""

    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor

    @property
    def spectral_radius(self) -> float:
        """Largest absolute eigenvalue of A."""
        return float(torch.linalg.eigvals(self.A).abs().max())


@dataclass(frozen=True, kw_only=True)
class Modal:
    """A system in its modes: real ones [r1], one of each conjugate pair [r2], and B' [r, m], C' [p, r] in real numbers.

    The rows of B' and columns of C' are those of the real modes, then real and imaginary part of each pair, so that
    y = C' s with s stepped mode by mode. `condition` is that of the eigenvectors.
    """

    real: torch.Tensor
    pairs: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    condition: float


def reachability(system: System) -> torch.Tensor:
    """The exact Gramian, sum over k of A^k B B^T A^kT, [n, n]; the number of summed terms doubles at every step."""
    return _gramian(system.A, system.B @ system.B.T)


def observability(system: System) -> torch.Tensor:
    """The exact Gramian, sum over k of A^kT C^T C A^k, [n, n]."""
    return _gramian(system.A.T, system.C.T @ system.C)


def _gramian(A: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    total, power = first, A
    while float(power.abs().max()) > torch.finfo(torch.float64).eps:
        total = total + power @ total @ power.T
        power = power @ power
    return (total + total.T) / 2


def empirical_reachability(states: torch.Tensor) -> torch.Tensor:
    """The Gramian that data reaches, H^T H / N of states [N, n]: the exact one for white input of unit covariance."""
    return states.T @ states / len(states)


def empirical_observability(system: System, num_steps: int) -> torch.Tensor:
    """The Gramian that outputs of `num_steps` steps show: inner products of the outputs from each unit initial state."""
    state, total = torch.eye(len(system.A), dtype=torch.float64), torch.zeros_like(system.A)
    for _ in range(num_steps):
        output = system.C @ state
        total = total + output.T @ output
        state = system.A @ state
    return total


def balance(W_c: torch.Tensor, W_o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the Hankel singular values [n], and the bases W [n, n] and T [n, n] by rows and columns of each.

    The first r rows of W and columns of T give the truncated system W A T, W B, C T; W T is the identity.
    """
    L_r, L_o = _factor(W_c), _factor(W_o)
    U, sigma, Vh = torch.linalg.svd(L_o.T @ L_r)
    # Directions that are neither reached nor seen have no scale of their own; they are never kept.
    scale = sigma.clamp(min=sigma[0] * torch.finfo(torch.float64).eps).rsqrt()
    return sigma, scale[:, None] * (U.T @ L_o.T), (L_r @ Vh.T) * scale


def _factor(gramian: torch.Tensor) -> torch.Tensor:
    """L with L L^T = the Gramian; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(gramian)
    factor: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return factor


def project(system: System, W: torch.Tensor, T: torch.Tensor) -> System:
    """The system between the bases W [r, n] and T [n, r]."""
    return System(W @ system.A @ T, W @ system.B, system.C @ T)


def choose_order(
    sigma: torch.Tensor, *, rank: int | None = None, tol: float | None = None, eps: float | None = None
) -> int:
    """Return the order by exactly one rule: `rank`; the smallest whose bound is at most `tol`; or sigma_i / sigma_1 >= `eps`.

    Raises `ConfigError` for none or several rules, or a rank that the system does not have.
    """
    if sum(rule is not None for rule in (rank, tol, eps)) != 1:
        raise ConfigError(f"truncation needs one of rank, tol and eps; got rank={rank}, tol={tol}, eps={eps}.")
    if rank is not None:
        if not 1 <= rank <= len(sigma):
            raise ConfigError(f"rank={rank}: the branch has order {len(sigma)}; choose a rank from 1 to {len(sigma)}.")
        return rank
    if eps is not None:
        return max(1, int((sigma / sigma[0] >= eps).sum()))
    return next(r for r in range(1, len(sigma) + 1) if bound(sigma, r) <= (tol or 0.0))


def bound(sigma: torch.Tensor, order: int) -> float:
    """Twice the sum of the discarded singular values: no frequency's error is larger."""
    return 2 * float(sigma[order:].sum())


def to_modes(system: System) -> Modal:
    """Return the system in its modes, each pair once, with B' and C' of equal size mode by mode."""
    values, X = torch.linalg.eig(system.A)
    B, C = torch.linalg.solve(X, system.B.to(X.dtype)), system.C.to(X.dtype) @ X
    scale = (C.norm(dim=0) / B.norm(dim=1)).sqrt()
    B, C = B * scale[:, None], C / scale
    is_real, is_upper = values.imag == 0, values.imag > 0
    pair_B, pair_C = B[is_upper], 2 * C[:, is_upper]
    return Modal(
        real=values[is_real].real,
        pairs=values[is_upper],
        # Interleaved: the real and the imaginary part of a pair are neighbours. y = 2 Re(C' s).
        B=torch.cat([B[is_real].real, torch.stack([pair_B.real, pair_B.imag], 1).flatten(0, 1)]),
        C=torch.cat([C[:, is_real].real, torch.stack([pair_C.real, -pair_C.imag], 2).flatten(1)], 1),
        condition=float(torch.linalg.cond(X)),
    )


def to_schur(system: System) -> System:
    """Return the system in coordinates in which A is quasi-triangular: always well conditioned, where modes are not."""
    triangular, Z = (torch.from_numpy(x) for x in schur(system.A.numpy(), output="real"))
    return System(triangular, Z.T @ system.B, system.C @ Z)


def largest_error(system: System, other: System, num_frequencies: int = 400) -> float:
    """Return the largest singular value of the difference of two systems' responses over a grid of frequencies.

    The grid is logarithmic from 1e-6 to pi, with 0 and the angles of the eigenvalues, where responses peak.
    """
    A = torch.block_diag(system.A, other.A).to(torch.complex128)  # type: ignore[no-untyped-call]
    # Of B and C only their triangular factors count: a response is no larger than n by n.
    B = torch.linalg.qr(torch.cat([system.B, other.B]).T, mode="r").R.T.to(A.dtype)
    C = torch.linalg.qr(torch.cat([system.C, -other.C], 1), mode="r").R.to(A.dtype)
    angles = torch.cat([torch.linalg.eigvals(A).angle().abs(), torch.zeros(1, dtype=torch.float64)])
    grid = torch.cat([torch.logspace(-6, math.log10(math.pi), num_frequencies, dtype=torch.float64), angles])
    eye = torch.eye(len(A), dtype=A.dtype)
    points = torch.polar(torch.ones_like(grid), grid)[:, None, None] * eye - A
    response = C @ torch.linalg.solve(points, B.expand(len(grid), *B.shape))
    return float(torch.linalg.matrix_norm(response, 2).max())
