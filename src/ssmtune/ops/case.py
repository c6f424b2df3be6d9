"""Cases that an operation must get right, each with its fp64 truth; every operation lists its own in `cases.py`.

Dimensions: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation with one set of inputs: the function under test, its truth, and the inputs in fp64.

    `stages`: how often the operation rounds to the inputs' dtype in a row, as the layers that it stands for do;
    `kernel_stages`: how often its kernels do, where that is more.
    """

    operation: str
    label: str
    function: Function
    truth: Function
    inputs: Tensors
    stages: int = 1
    kernel_stages: int = 1


def sequence_cases(
    operation: str,
    function: Callable[..., Any],
    recurrence: Callable[..., Any],
    inputs: Callable[[torch.Generator, int], Tensors],
    *,
    state: str,
    options: Mapping[str, Any],
    kernel_stages: int = 1,
) -> list[Case]:
    """Return the cases of an operation over sequences: odd lengths, packed, padded, continued, and their pairs.

    Both functions take `inputs(generator, num_steps)` by name and return an output and a final state; `state` names the
    initial one, which the cases that start from zero leave out.
    """
    variants: list[tuple[str, int, Tensors]] = [
        ("plain", 1, {}),
        ("plain", 63, {}),
        ("plain", 131, {}),
        ("packed", 131, {"seq_idx": segments(2, 131, (5, 64, 70))}),
        ("padded", 75, {"padding_mask": mask(2, 75, 11)}),
        ("continued", 75, {}),
        ("continued and padded", 75, {"padding_mask": mask(2, 75, 11)}),
        ("continued and packed", 75, {"seq_idx": segments(2, 75, (20,))}),
    ]
    cases = []
    for seed, (label, num_steps, extra) in enumerate(variants):
        tensors = inputs(torch.Generator().manual_seed(seed), num_steps)
        kept = {name: value for name, value in tensors.items() if name != state or label.startswith("continued")}
        cases.append(
            Case(
                operation=operation,
                label=f"{label}, {num_steps} step{'s' * (num_steps > 1)}",
                function=named_outputs(function, options),
                truth=named_outputs(recurrence, options),
                inputs=kept | extra,
                kernel_stages=kernel_stages,
            )
        )
    return cases


def named_outputs(function: Callable[..., Any], options: Mapping[str, Any]) -> Function:
    """`function`, which returns an output and a final state, as a case runs it."""

    def run(tensors: Tensors) -> Tensors:
        output, final = function(**tensors, **options)
        return {"output": output, "final state": final}

    return run


def step_case(
    operation: str, step: Callable[[Tensors, torch.Tensor], torch.Tensor], truth: Function, inputs: Tensors, state: str
) -> Case:
    """Return the case of one decoding step, without gradients: `step(inputs, state)` writes the state in place."""

    def run(tensors: Tensors) -> Tensors:
        with torch.no_grad():
            final = tensors[state].clone()
            output = step(tensors, final)
        return {"output": output, "final state": final}

    def run_truth(tensors: Tensors) -> Tensors:
        with torch.no_grad():
            return truth(tensors)

    return Case(operation=operation, label="one step", function=run, truth=run_truth, inputs=inputs)


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Return standard normal numbers in fp64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def segments(batch: int, num_steps: int, boundaries: tuple[int, ...]) -> torch.Tensor:
    """Return document numbers [B, T]; the second row has its boundaries one step later."""
    steps = torch.arange(num_steps)
    rows = [sum((steps >= b + row).int() for b in boundaries) for row in range(batch)]
    return torch.stack([torch.as_tensor(row) for row in rows]).to(torch.int32)


def mask(batch: int, num_steps: int, num_padded: int) -> torch.Tensor:
    """Return 1 at real tokens [B, T]; the first row is padded on the left, the last on the right."""
    real = torch.ones(batch, num_steps, dtype=torch.long)
    real[0, :num_padded] = 0
    real[-1, -num_padded:] = 0
    return real
