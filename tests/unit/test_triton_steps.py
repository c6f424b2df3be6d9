"""The kernels of single decoding steps in Triton's interpreter, on the cases of each operation."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from tolerances import relative_rms

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from ssmtune import doctor
from ssmtune.errors import ConfigError
from ssmtune.op_cases import case_errors
from ssmtune.ops.case import Case
from ssmtune.ops.causal_conv1d import causal_conv1d_update
from ssmtune.ops.mamba1_selective_scan import mamba1_state_update
from ssmtune.ops.selective_state_update import selective_state_update

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    pytest.mark.usefixtures("poisoned_memory"),
]

OPERATIONS = {
    "causal_conv1d_update": "causal_conv1d",
    "mamba1_state_update": "mamba1_selective_scan",
    "selective_state_update": "selective_state_update",
}
"""Each with the folder of its cases."""

CPU = torch.device("cpu")

# The interpreter cuts what it stores in bf16 off instead of rounding it, which costs up to a whole unit of 2^-8.
LIMITS = {torch.float32: doctor.LIMITS[torch.float32], torch.bfloat16: 2 * doctor.LIMITS[torch.bfloat16]}


def cases_with(monkeypatch: pytest.MonkeyPatch, operation: str, function: Any) -> list[Case]:
    """The operation's cases with `function` in its place."""
    module = importlib.import_module(f"ssmtune.ops.{OPERATIONS[operation]}.cases")
    monkeypatch.setattr(module, operation, function)
    return [case for case in module.cases() if case.operation == operation]


def on_kernels(monkeypatch: pytest.MonkeyPatch, operation: str) -> list[Case]:
    package = importlib.import_module(f"ssmtune.ops.{OPERATIONS[operation]}")
    return cases_with(monkeypatch, operation, partial(getattr(package, operation), backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_are_right_on_the_cases(operation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = on_kernels(monkeypatch, operation)
    found = {case.label: case_errors(case, dtype, CPU) for case in cases}
    assert cases and max(max(errors.values()) for errors in found.values()) <= LIMITS[dtype], found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_state_left_as_it_was_is_seen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module(f"ssmtune.ops.{OPERATIONS[operation]}")

    def forgetful(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        position = 1 if operation == "causal_conv1d_update" else 0
        copied = [value.clone() if i == position else value for i, value in enumerate(given)]
        output: torch.Tensor = getattr(package, operation)(*copied, **options, backend="triton")
        return output

    (case,) = cases_with(monkeypatch, operation, forgetful)
    errors = case_errors(case, torch.float32, CPU)
    assert errors["output"] <= LIMITS[torch.float32]
    assert errors["state" if operation == "causal_conv1d_update" else "final state"] > 0.1


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_convolution_step_shifts_a_window_of_either_length(length: int, dtype: torch.dtype) -> None:
    """A layer's views: channels of a wider projection, a cache that holds K or K-1 inputs, no bias, no activation."""
    g = torch.Generator().manual_seed(length)
    x, weight = torch.randn(2, 1, 9, generator=g, dtype=dtype)[..., 2:7].transpose(1, 2), torch.randn(5, 4, generator=g)
    ours = torch.randn(2, 5, length, generator=g).to(dtype)
    theirs = ours.clone()
    y = causal_conv1d_update(x, ours, weight, backend="triton")
    expected = causal_conv1d_update(x.double(), theirs.double(), weight.double())
    causal_conv1d_update(x, theirs, weight, backend="reference")
    assert torch.equal(ours, theirs) and y.shape == x.shape and y.dtype == dtype
    assert relative_rms(y, expected) <= LIMITS[dtype]


def test_a_bf16_state_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    state, x, dt = torch.randn(1, 4, 3, generator=g), torch.randn(1, 4, generator=g), torch.rand(1, 4, generator=g)
    A, B, C = -torch.rand(4, 3, generator=g), torch.randn(1, 3, generator=g), torch.randn(1, 3, generator=g)
    ours, theirs = state.bfloat16(), state.bfloat16()
    y = mamba1_state_update(ours, x, dt, A, B, C, backend="triton")
    expected = mamba1_state_update(theirs, x, dt, A, B, C, backend="reference")
    assert ours.dtype == torch.bfloat16 and relative_rms(ours, theirs) <= LIMITS[torch.bfloat16]
    assert relative_rms(y, expected) <= LIMITS[torch.float32]


def test_step_kernels_say_what_they_cannot_serve() -> None:
    state, row = torch.zeros(1, 2, 3), torch.zeros(1, 2)
    A = -torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ConfigError, match="gradients are asked for"):
        mamba1_state_update(state, row, row, A, torch.zeros(1, 3), torch.zeros(1, 3), backend="triton")
    with torch.no_grad():
        mamba1_state_update(state, row, row, A, torch.zeros(1, 3), torch.zeros(1, 3), backend="triton")
    with pytest.raises(ConfigError, match="2 steps at once; the kernel takes one"):
        causal_conv1d_update(torch.zeros(1, 2, 2), state, torch.zeros(2, 4), backend="triton")
    x, dt, B = torch.zeros(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 1, 1025)
    with pytest.raises(ConfigError, match="state size 1025 is over 1024"):
        selective_state_update(torch.zeros(1, 2, 3, 1025), x, dt, -torch.ones(2), B, B, backend="triton")


def test_the_limits_of_a_step_hold() -> None:
    """Steps below, between and above the limits; the cases' own lie between them."""
    g = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(*shape, generator=g) for shape in ((1, 6, 3), (1, 6), (1, 2, 5), (1, 2, 5)))
    dt[0, :3] = torch.tensor([-9.0, 0.0, 9.0])
    states = [torch.ones(1, 6, 3, 5), torch.ones(1, 6, 3, 5)]
    outputs = [
        selective_state_update(
            state, x, dt, -torch.ones(6), B, C, dt_softplus=True, dt_limit=(0.1, 1.5), backend=backend
        )
        for state, backend in zip(states, ("triton", "reference"), strict=True)
    ]
    for found, expected in (outputs, states):
        assert relative_rms(found, expected) <= LIMITS[torch.float32]
