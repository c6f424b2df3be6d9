"""Run the cases that every operation lists beside its reference; `doctor` does so on the user's machine."""

from __future__ import annotations

import importlib
import math
import pkgutil
from typing import Any

import torch

from ssmtune import ops
from ssmtune.ops.case import Case, Function, Tensors


def all_cases() -> list[Case]:
    """Return the cases of all operations: `ssmtune.ops.<operation>.cases.cases()`, in the order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)
    return [case for name in names for case in importlib.import_module(f"{ops.__name__}.{name}.cases").cases()]


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
