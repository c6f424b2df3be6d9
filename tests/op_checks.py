"""What every recurrent operation must satisfy, given its recurrence in fp64: outputs, final states and every gradient.

A test file per operation calls these with its own inputs; the letter T in a tensor's name says which dimension is time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerances import BF16_ROUND_ONCE, OP_FP32, OP_FP64, relative_rms

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A function, its recurrence, and the names under which both take what the checks vary."""

    function: Callable[..., Any]
    recurrence: Callable[..., Any]
    state: str
    """The argument that holds the initial state, of the shape of the final one."""
    options: Mapping[str, Any]
    time_first: bool = True
    """Whether the output is [B, T, ...]; else its time comes last."""
    state_batch: int = 0
    """Which dimension of the state is the batch."""
    kept_wide: tuple[str, ...] = ()
    """Parameters that models hold in fp32 also when their activations are bf16."""


def time_dimension(name: str) -> int | None:
    """Which dimension of an argument is time, from its name; a log decay `g` is [B, T, ...] in two shapes."""
    position = 1 if name == "g" else name.rpartition("_")[2].find("T")
    return None if position < 0 else position


def at_steps(tensors: Tensors, steps: slice) -> Tensors:
    """The arguments of some of the steps."""
    taken = {}
    for name, value in tensors.items():
        dim = time_dimension(name)
        taken[name] = value if dim is None else value[(slice(None),) * dim + (steps,)]
    return taken


def run_with_gradients(operation: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, **options: Any) -> Tensors:
    """Output, final state and the gradient of every argument under one fixed random loss over both."""
    leaves = {name: value.detach().clone().to(dtype).requires_grad_() for name, value in tensors.items()}
    y, state = operation(**leaves, **options)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in (y, state)]
    loss = sum(((value.double() * w).sum() for value, w in zip((y, state), weights, strict=True)), torch.zeros(()))
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"y": y.detach(), "state": state.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def errors(found: Tensors, truth: Tensors) -> dict[str, float]:
    """The relative RMS error of each value; not finite counts as infinitely wrong."""
    assert found.keys() == truth.keys()
    return {
        name: relative_rms(found[name], truth[name]) if bool(torch.isfinite(found[name]).all()) else float("inf")
        for name in truth
    }


def check_recurrence(op: Operation, tensors: Tensors, *, fp32_limit: float = OP_FP32, **options: Any) -> None:
    """fp64 is exact up to the order of summation, fp32 within `fp32_limit`, in every value and gradient."""
    options = {**op.options, **options}
    truth = run_with_gradients(op.recurrence, tensors, torch.float64, **options)
    for dtype, limit in ((torch.float64, OP_FP64), (torch.float32, fp32_limit)):
        found = errors(run_with_gradients(op.function, tensors, dtype, **options), truth)
        assert max(found.values()) <= limit, (dtype, found)


def check_kernels(op: Operation, tensors: Tensors, *, limit: float = OP_FP32, **options: Any) -> None:
    """The function in fp32 within `limit` of its recurrence in fp64, on inputs that fp32 holds exactly."""
    options = {**op.options, **options}
    exact = {name: value.float().double() for name, value in tensors.items()}
    truth = run_with_gradients(op.recurrence, exact, torch.float64, **options)
    found = errors(run_with_gradients(op.function, exact, torch.float32, **options), truth)
    assert max(found.values()) <= limit, found


def documents(num_steps: int, *starts: int) -> torch.Tensor:
    """Document numbers [2, T]: new ones at `starts` in the first row, one step later in the second."""
    steps = torch.arange(num_steps)
    rows = [sum((steps >= start + row).int() for start in starts) for row in range(2)]
    return torch.stack([torch.as_tensor(row) for row in rows]).to(torch.int32)


def check_documents(op: Operation, tensors: Tensors, seq_idx: torch.Tensor) -> None:
    """Packed equals the recurrence with gradients, and each document's outputs are those of it alone."""
    check_recurrence(op, tensors, seq_idx=seq_idx)
    alone = {name: value for name, value in tensors.items() if name != op.state}
    packed, final = op.function(**tensors, **op.options, seq_idx=seq_idx)
    for row in range(2):
        numbers = seq_idx[row]
        for number in numbers.unique():
            inside = (numbers == number).nonzero().squeeze(1)
            steps = slice(int(inside[0]), int(inside[-1]) + 1)
            first = {op.state: tensors[op.state]} if op.state in tensors and steps.start == 0 else {}
            y, state = op.function(**at_steps(alone, steps), **first, **op.options)
            took = packed[row, steps] if op.time_first else packed[row, ..., steps]
            assert relative_rms(took, y[row]) <= OP_FP64, (row, number)
        last = [value.select(op.state_batch, row) for value in (final, state)]
        assert relative_rms(*last) <= OP_FP64


def padding(num_steps: int, side: str) -> tuple[torch.Tensor, slice]:
    """A mask [2, T] with the same third of both rows padded, and the real steps."""
    num_padded = max(1, num_steps // 3)
    real = slice(num_padded, None) if side == "left" else slice(0, num_steps - num_padded)
    mask = torch.zeros(2, num_steps, dtype=torch.long)
    mask[:, real] = 1
    return mask, real


def check_padding(op: Operation, tensors: Tensors, num_steps: int, side: str) -> None:
    """Padded equals the recurrence with gradients; its real outputs and its state are those of the real steps alone."""
    mask, real = padding(num_steps, side)
    check_recurrence(op, tensors, padding_mask=mask)
    y, state = op.function(**tensors, **op.options, padding_mask=mask)
    y_alone, state_alone = op.function(**at_steps(tensors, real), **op.options)
    assert relative_rms(y[:, real] if op.time_first else y[..., real], y_alone) <= OP_FP64
    assert relative_rms(state, state_alone) <= OP_FP64


def check_two_calls(op: Operation, tensors: Tensors, cut: int) -> None:
    """A sequence in two calls, the state passed, is the sequence in one."""
    y, state = op.function(**tensors, **op.options)
    y_first, between = op.function(**at_steps(tensors, slice(0, cut)), **op.options)
    rest = at_steps(tensors, slice(cut, None)) | {op.state: between}
    y_rest, final = op.function(**rest, **op.options)
    assert relative_rms(torch.cat([y_first, y_rest], dim=1 if op.time_first else -1), y) <= OP_FP64
    assert relative_rms(final, state) <= OP_FP64


def check_bf16(op: Operation, tensors: Tensors) -> None:
    """bf16 activations give what fp32 gives for the same numbers, rounded once; the state is not rounded."""
    wide = (*op.kept_wide, op.state)
    narrow = {name: value.float() if name in wide else value.bfloat16() for name, value in tensors.items()}
    y, state = op.function(**narrow, **op.options)
    y_wide, state_wide = op.function(**{name: value.float() for name, value in narrow.items()}, **op.options)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, y_wide.bfloat16()) and torch.equal(state, state_wide)
    truth, _ = op.recurrence(**{name: value.double() for name, value in narrow.items()}, **op.options)
    assert relative_rms(y, truth) <= BF16_ROUND_ONCE


def check_autocast(op: Operation, tensors: Tensors) -> None:
    """Autocast changes no bit."""
    tensors = {name: value.float() for name, value in tensors.items()}
    plain = op.function(**tensors, **op.options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = op.function(**tensors, **op.options)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def check_a_fault_is_seen(op: Operation, fault: Callable[..., Any], tensors: Tensors, **options: Any) -> None:
    """`check_recurrence` fails on a wrong function, by more than any rounding."""
    wrong = Operation(function=fault, recurrence=op.recurrence, state=op.state, options=op.options)
    with pytest.raises(AssertionError):
        check_recurrence(wrong, tensors, fp32_limit=1e-3, **options)


def without(function: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """A planted fault: the function ignores one of its arguments."""
    return lambda **arguments: function(**{**arguments, argument: None})
