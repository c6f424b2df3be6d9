"""The states of a diagonal system: transform and scan against the recurrence, step by step, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import OP_FP32, OP_FP64, largest_difference, relative_rms

from ssmtune.methods._branch import Branch
from ssmtune.methods._dynamics import ContinuousModes, DenseDynamics, DiscreteModes
from ssmtune.ops.modal_scan import Backend, dense_states, modal_states

LONG = {"fft": 1e-5, "scan": OP_FP32}
"""Relative error of fp32 over 8,192 steps. The transform rounds a logarithmic number of times; the scan multiplies 91
decays in a row, and so many rounding errors of half an eps make 1e-5 at worst, beside those of the sums."""


def recurrence(
    a: torch.Tensor, u: torch.Tensor, initial: torch.Tensor | None = None, starts: torch.Tensor | None = None
) -> torch.Tensor:
    state = torch.zeros_like(u[:, 0]) if initial is None else initial
    states = []
    for t in range(u.shape[1]):
        decay = a if starts is None else a * (~starts[:, t, None])
        state = decay * state + u[:, t]
        states.append(state)
    return torch.stack(states, 1)


def decays(num: int, *, complex_modes: bool) -> torch.Tensor:
    """From modes that are gone in a step to ones that live for 10,000, all angles."""
    k = torch.arange(1, num + 1, dtype=torch.float64)
    size = torch.exp(-torch.logspace(-4, 0.5, num, dtype=torch.float64))
    return torch.polar(size, math.pi * k / num) if complex_modes else size


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


@pytest.mark.parametrize("complex_modes", [False, True])
@pytest.mark.parametrize("backend", ["fft", "scan"])
def test_fp32_equals_the_recurrence_over_8192_steps(backend: Backend, complex_modes: bool) -> None:
    a = decays(8, complex_modes=complex_modes)
    a = a.to(torch.complex64 if complex_modes else torch.float32)
    u = torch.randn(1, 8192, 8, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    truth = recurrence(a.to(wide(a.dtype)), u.to(wide(u.dtype)))
    found = modal_states(a, u, backend=backend)
    for mode in range(8):
        parts = (torch.view_as_real(x[..., mode].to(torch.complex128)) for x in (found, truth))
        assert relative_rms(*parts) <= LONG[backend]
    # Planted fault: a transform without padding wraps the end of the row around to its start.
    wrapped = torch.fft.ifft(
        torch.fft.fft(recurrence(a, torch.eye(8192, 1)[None].expand(1, -1, 8).to(a.dtype)), dim=1)
        * torch.fft.fft(u, dim=1),
        dim=1,
    )
    error = (wrapped - truth).abs().square().mean().sqrt() / truth.abs().square().mean().sqrt()
    assert float(error) > 100 * LONG[backend]


@pytest.mark.parametrize("complex_modes", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 37, 64])
@pytest.mark.parametrize("backend", ["fft", "scan"])
def test_values_and_gradients_in_double(backend: Backend, num_steps: int, complex_modes: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    a = decays(3, complex_modes=complex_modes)
    u = torch.randn(2, num_steps, 3, dtype=a.dtype, generator=generator)
    initial = torch.randn(2, 3, dtype=a.dtype, generator=generator)
    weight = torch.randn(2, num_steps, 3, dtype=a.dtype, generator=generator)
    results = []
    for function in (recurrence, lambda *x: modal_states(*x, backend=backend)):
        leaves = [x.clone().requires_grad_() for x in (a, u, initial)]
        states = function(*leaves)
        (states * weight).real.sum().backward() if complex_modes else (states * weight).sum().backward()
        results.append([states.detach(), *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        expected, found = (torch.view_as_real(x.to(torch.complex128)) for x in (expected, found))
        assert relative_rms(found, expected) <= OP_FP64


@pytest.mark.parametrize("complex_modes", [False, True])
def test_documents_start_from_zero(complex_modes: bool) -> None:
    a = decays(3, complex_modes=complex_modes)
    u = torch.randn(2, 23, 3, dtype=a.dtype, generator=torch.Generator().manual_seed(2))
    starts = torch.zeros(2, 23, dtype=torch.bool)
    starts[0, 5] = starts[0, 6] = starts[1, 20] = True
    found, expected = modal_states(a, u, None, starts), recurrence(a, u, None, starts)
    assert float((found - expected).abs().max()) <= OP_FP64
    assert float((modal_states(a, u) - expected).abs().max()) > 1e-3


def test_a_matrix_without_modes() -> None:
    generator = torch.Generator().manual_seed(3)
    A = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=generator)
    u = torch.randn(2, 29, 4, dtype=torch.float64, generator=generator)
    initial = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    state, expected = initial, []
    for t in range(29):
        state = state @ A.T + u[:, t]
        expected.append(state)
    for cut in (1, 28, 29):
        found = dense_states(A, u[:, :cut], initial)
        assert relative_rms(found, torch.stack(expected[:cut], 1)) <= OP_FP64


def branches() -> dict[str, Branch]:
    torch.manual_seed(4)
    made = {
        "real": Branch(5, 6, ContinuousModes(6, complex_modes=False, backend="fft"), gates=1, start=1.0),
        "complex": Branch(5, 6, ContinuousModes(6, complex_modes=True, backend="fft"), gates=5, start=1.0),
        "discrete": Branch(5, 5, DiscreteModes(1, 2), gates=1, start=1.0),
        "dense": Branch(5, 4, DenseDynamics(4), gates=1, start=1.0),
        "static": Branch(5, 6, None, gates=1, start=1.0),
    }
    with torch.no_grad():
        for name in ("discrete", "dense"):
            for parameter in made[name].dynamics.parameters():  # type: ignore[union-attr]
                parameter.copy_(0.4 * torch.randn(parameter.shape))
    return {name: branch.double() for name, branch in made.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", list(branches()))
def test_a_branch_in_pieces_packed_and_padded(name: str) -> None:
    """One definition in every situation: a whole row, cut at any place, beside another document, and with padding."""
    branch = branches()[name]
    torch.nn.Module.float(branch)  # its inputs are fp32
    x = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(5))
    expected, final = branch(x)
    for cut in (1, 6, 12):
        first, state = branch(x[:, :cut])
        second, last = branch(x[:, cut:], None, None, state)
        assert largest_difference(torch.cat([first, second], 1), expected) <= OP_FP32
        if final is not None:
            assert largest_difference(last, final) <= OP_FP32
    packed, _ = branch(torch.cat([x[:1, :4], x[1:]], 1), torch.tensor([[0] * 4 + [1] * 13]))
    assert largest_difference(packed[:, :4], expected[:1, :4]) <= OP_FP32
    assert largest_difference(packed[:, 4:], expected[1:]) <= OP_FP32
    mask = torch.tensor([[0] * 3 + [1] * 13 + [0] * 2])
    padded, state = branch(torch.cat([torch.ones(1, 3, 5), x[:1], torch.ones(1, 2, 5)], 1), None, mask)
    assert largest_difference(padded[:, 3:16], expected[:1]) <= OP_FP32
    if final is not None:
        assert largest_difference(state, final[:1]) <= OP_FP32
    # Planted fault: nothing of this would hold for a branch that forgets its state.
    forgetful, _ = branch(x[:, 6:])
    assert (float((forgetful - expected[:, 6:]).abs().max()) < 1e-5) == (name == "static")


def test_no_step_size_is_out_of_reach() -> None:
    """The released clamp gives no gradient at its bounds; here every step size has one, and stays inside."""
    modes = ContinuousModes(4, complex_modes=False, backend="fft")
    with torch.no_grad():
        modes.logit_dt.copy_(torch.tensor([-8.0, -1.0, 1.0, 8.0]))
    decay, _ = modes.discretise()
    decay.sum().backward()
    assert bool((modes.logit_dt.grad.abs() > 0).all())  # type: ignore[union-attr]
    dt = -decay.detach().log() / torch.arange(1, 5)
    assert float(dt.min()) >= 1e-4 * (1 - 1e-2) and float(dt.max()) <= 0.1 * (1 + 1e-5)


def test_zero_order_hold_equals_its_integral() -> None:
    """decay = exp(dt a), factor = integral of exp(s a) over one step, against a fine sum (midpoints, relative 1e-6)."""
    for complex_modes in (False, True):
        modes = ContinuousModes(8, complex_modes=complex_modes, backend="fft").double()
        decay, factor = modes.discretise()
        a = -modes.log_A.exp()
        a = torch.complex(a, modes.imag_A) if complex_modes else a
        dt = 1e-4 * (math.log(1e3) * torch.sigmoid(modes.logit_dt)).exp()
        midpoints = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        integral = (midpoints[:, None] * dt * a).exp().mean(0) * dt
        torch.testing.assert_close(decay, (dt * a).exp())
        torch.testing.assert_close(factor, integral, rtol=1e-6, atol=0)
