"""Cases that every operation must get right, each with its fp64 truth; `doctor` runs them on the user's machine.

Dimensions: B batch, C channels, T time, K taps, H heads, P head width, G groups, N state size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan, mamba2_recurrence
from ssmtune.ops.selective_state_update import selective_state_update

Tensors = dict[str, torch.Tensor]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation with one set of inputs: the function under test, its truth, and the inputs in fp64."""

    operation: str
    label: str
    function: Function
    truth: Function
    inputs: Tensors


def case_errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the relative root-mean-square error of each output and each gradient of a case."""
    rounded = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in case.inputs.items()}
    found = _values_and_gradients(case.function, rounded, dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in rounded.items()}
    truth = _values_and_gradients(case.truth, exact, dtype)
    return {key: _relative_error(found[key], truth[key]) for key in truth}


def _values_and_gradients(function: Function, inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Outputs, and gradients of their product with fixed weights (exact in `dtype`) for every floating-point input."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v.is_floating_point()}
    outputs = function({**inputs, **leaves})
    generator = torch.Generator().manual_seed(7)
    total: Any = 0
    for value in outputs.values():
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        total = total + (value.double() * weight.to(value.device, dtype)).sum()
    gradients: tuple[torch.Tensor | None, ...] = (None,) * len(leaves)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    values = {name: value.detach() for name, value in outputs.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        values[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return values


def _relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    if found.shape != truth.shape or not bool(torch.isfinite(found).all()):
        return math.inf
    scale = float(truth.double().square().mean().sqrt())
    error = float((found.double() - truth.double()).square().mean().sqrt())
    return error / scale if scale > 0 else error


def _draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _segments(batch: int, num_steps: int, boundaries: tuple[int, ...]) -> torch.Tensor:
    """Document numbers [B, T]; the second row has its boundaries one step later."""
    steps = torch.arange(num_steps)
    rows = [sum((steps >= b + row).int() for b in boundaries) for row in range(batch)]
    return torch.stack([torch.as_tensor(row) for row in rows]).to(torch.int32)


def _mask(batch: int, num_steps: int, num_padded: int) -> torch.Tensor:
    """1 at real tokens [B, T]; the first row is padded on the left, the last on the right."""
    mask = torch.ones(batch, num_steps, dtype=torch.long)
    mask[0, :num_padded] = 0
    mask[-1, -num_padded:] = 0
    return mask


def _conv_cases() -> list[Case]:
    def run(t: Tensors) -> Tensors:
        extra = {name: t.get(name) for name in ("seq_idx", "padding_mask")}
        return {"output": causal_conv1d(t["x"], t["weight"], t["bias"], "silu", **extra)}

    generator = torch.Generator().manual_seed(1)
    cases = []
    for length in (3, 67):
        inputs = {"x": _draw(generator, 2, 9, length), "weight": _draw(generator, 9, 4), "bias": _draw(generator, 9)}
        variants: dict[str, Tensors] = {"plain": {}}
        if length > 3:
            variants["packed"] = {"seq_idx": _segments(2, length, (5, 6, 40))}
            variants["padded"] = {"padding_mask": _mask(2, length, 7)}
        cases += [
            Case(
                operation="causal_conv1d",
                label=f"{label}, {length} steps",
                function=run,
                truth=_conv_truth,
                inputs={**inputs, **extra},
            )
            for label, extra in variants.items()
        ]
    return cases


def _conv_truth(t: Tensors) -> Tensors:
    """Tap by tap, one step at a time."""
    x_BCT, weight_CK = t["x"], t["weight"]
    if "padding_mask" in t:
        x_BCT = x_BCT * t["padding_mask"][:, None].to(x_BCT.dtype)
    num_taps = weight_CK.shape[1]
    steps = []
    for step in range(x_BCT.shape[-1]):
        total = t["bias"].expand(x_BCT.shape[0], -1)
        for lag in range(min(num_taps, step + 1)):
            value = x_BCT[..., step - lag] * weight_CK[:, num_taps - 1 - lag]
            if "seq_idx" in t:
                value = value * (t["seq_idx"][:, step] == t["seq_idx"][:, step - lag])[:, None]
            total = total + value
        steps.append(total)
    return {"output": F.silu(torch.stack(steps, dim=-1))}


def _conv_update_cases() -> list[Case]:
    def run(t: Tensors) -> Tensors:
        with torch.no_grad():
            state = t["state"].clone()
            output = causal_conv1d_update(t["x"], state, t["weight"], t["bias"], "silu")
        return {"output": output, "state": state}

    def truth(t: Tensors) -> Tensors:
        with torch.no_grad():
            sequence = torch.cat([t["state"], t["x"]], dim=-1)
            output = _conv_truth({"x": sequence, "weight": t["weight"], "bias": t["bias"]})["output"]
        return {"output": output[..., -1:], "state": sequence[..., 1:]}

    generator = torch.Generator().manual_seed(2)
    inputs = {
        "x": _draw(generator, 3, 9, 1),
        "state": _draw(generator, 3, 9, 4),
        "weight": _draw(generator, 9, 4),
        "bias": _draw(generator, 9),
    }
    return [Case(operation="causal_conv1d_update", label="one step", function=run, truth=truth, inputs=inputs)]


def _scan_inputs(seed: int, num_steps: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": _draw(generator, 2, num_steps, 6, 5),
        "dt": _draw(generator, 2, num_steps, 6),
        "A": -_draw(generator, 6).exp(),
        "B": _draw(generator, 2, num_steps, 2, 7),
        "C": _draw(generator, 2, num_steps, 2, 7),
        "D": _draw(generator, 6),
        "dt_bias": _draw(generator, 6) - 2,
    }


def _scan(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Function:
    def run(t: Tensors) -> Tensors:
        output, state = function(
            t["x"],
            t["dt"],
            t["A"],
            t["B"],
            t["C"],
            D_H=t["D"],
            dt_bias_H=t["dt_bias"],
            initial_states_BHPN=t.get("initial state"),
            dt_softplus=True,
            dt_limit=(0.001, 5.0),
            seq_idx=t.get("seq_idx"),
            padding_mask=t.get("padding_mask"),
        )
        return {"output": output, "final state": state}

    return run


def _scan_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(3)
    state = {"initial state": _draw(generator, 2, 6, 5, 7)}
    variants: list[tuple[str, int, Tensors]] = [
        ("plain", 1, {}),
        ("plain", 63, {}),
        ("plain", 131, {}),
        ("packed", 131, {"seq_idx": _segments(2, 131, (5, 64, 70))}),
        ("padded", 75, {"padding_mask": _mask(2, 75, 11)}),
        ("continued", 75, state),
        ("continued and padded", 75, {**state, "padding_mask": _mask(2, 75, 11)}),
        ("continued and packed", 75, {**state, "seq_idx": _segments(2, 75, (20,))}),
    ]
    return [
        Case(
            operation="mamba2_chunk_scan",
            label=f"{label}, {num_steps} steps",
            function=_scan(mamba2_chunk_scan),
            truth=_scan(mamba2_recurrence),
            inputs={**_scan_inputs(seed, num_steps), **extra},
        )
        for seed, (label, num_steps, extra) in enumerate(variants)
    ]


def _state_update_cases() -> list[Case]:
    def run(t: Tensors) -> Tensors:
        with torch.no_grad():
            state = t["state"].clone()
            output = selective_state_update(
                state,
                t["x"][:, 0],
                t["dt"][:, 0],
                t["A"],
                t["B"][:, 0],
                t["C"][:, 0],
                D_H=t["D"],
                dt_bias_H=t["dt_bias"],
                dt_softplus=True,
                dt_limit=(0.001, 5.0),
            )
        return {"output": output, "final state": state}

    def truth(t: Tensors) -> Tensors:
        with torch.no_grad():
            values = _scan(mamba2_recurrence)({**t, "initial state": t["state"]})
        return {"output": values["output"][:, 0], "final state": values["final state"]}

    generator = torch.Generator().manual_seed(4)
    inputs = {**_scan_inputs(9, 1), "state": _draw(generator, 2, 6, 5, 7)}
    return [Case(operation="selective_state_update", label="one step", function=run, truth=truth, inputs=inputs)]


def all_cases() -> list[Case]:
    """Return the cases of all operations."""
    return [*_conv_cases(), *_conv_update_cases(), *_scan_cases(), *_state_update_cases()]
