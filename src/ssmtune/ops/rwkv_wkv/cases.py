"""What RWKV-4's WKV must get right. Dimensions: B batch, T time, D channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmtune.ops.case import Case, Tensors, draw, sequence_cases
from ssmtune.ops.rwkv_wkv import rwkv_wkv, rwkv_wkv_recurrence


def inputs(generator: torch.Generator, num_steps: int) -> Tensors:
    """Return the arguments; the initial state is num and den [2, B, D] in units of 1."""
    return {
        "time_decay_D": draw(generator, 9) - 2,
        "time_first_D": draw(generator, 9),
        "k_BTD": draw(generator, 2, num_steps, 9),
        "v_BTD": draw(generator, 2, num_steps, 9),
        "state_2BD": draw(generator, 2, 2, 9).abs() + 1,
    }


def cases() -> list[Case]:
    """Return the cases over sequences; one step is the shortest of them."""
    run, truth = _in_one_unit(rwkv_wkv), _in_one_unit(rwkv_wkv_recurrence)
    return sequence_cases("rwkv_wkv", run, truth, inputs, state="state_2BD", options={})


def _in_one_unit(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., Any]:
    """The state as num and den; the unit in which an implementation holds them is its own affair."""

    def run(*, state_2BD: torch.Tensor | None = None, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        initial = None if state_2BD is None else torch.cat([state_2BD, torch.zeros_like(state_2BD[:1])])
        output, (num, den, top) = function(**tensors, initial_state_3BD=initial)
        return output, torch.stack([num, den]) * torch.exp(top)

    return run
