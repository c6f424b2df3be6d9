"""What the RG-LRU must get right. Dimensions: B batch, T time, D channels."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, draw, sequence_cases
from ssmtune.ops.rg_lru import rg_lru, rg_lru_recurrence


def inputs(generator: torch.Generator, num_steps: int) -> Tensors:
    """Return the arguments, the initial state included."""
    return {
        "x_BTD": draw(generator, 2, num_steps, 9),
        "log_a_BTD": -torch.exp(draw(generator, 2, num_steps, 9) - 2),
        "initial_state_BD": draw(generator, 2, 9),
    }


def cases() -> list[Case]:
    """Return the cases over sequences; one step is the shortest of them."""
    return sequence_cases("rg_lru", rg_lru, rg_lru_recurrence, inputs, state="initial_state_BD", options={})
