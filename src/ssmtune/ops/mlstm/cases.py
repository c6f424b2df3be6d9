"""What xLSTM's matrix memory must get right. Dimensions: B batch, H heads, T time, K query and key width, V value width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ssmtune.ops.case import Case, Tensors, draw, sequence_cases
from ssmtune.ops.mlstm import mlstm, mlstm_recurrence


def inputs(generator: torch.Generator, num_steps: int) -> Tensors:
    """Return the arguments; the initial state is C beside n [B, H, K, V + 1] in units of 1.

    Queries and keys are positive, queries of one head negative: where q n cancels, dividing by it multiplies whatever
    was rounded before. The forget gates keep a state for a few steps to a few hundred.
    """
    q = draw(generator, 2, 3, num_steps, 4).abs()
    q[:, 0] *= -1
    state = draw(generator, 2, 3, 4, 6)
    state[..., -1].abs_()
    return {
        "q_BHTK": q,
        "k_BHTK": draw(generator, 2, 3, num_steps, 4).abs(),
        "v_BHTV": draw(generator, 2, 3, num_steps, 5),
        "igate_BHT": draw(generator, 2, 3, num_steps) - 1,
        "fgate_BHT": 2 * draw(generator, 2, 3, num_steps) + 3,
        "offset_HKV": draw(generator, 3, 4, 5),
        "state_BHKW": state,
    }


def cases() -> list[Case]:
    """Return the cases over sequences; one step is the shortest of them."""
    run, truth = _in_one_unit(mlstm), _in_one_unit(mlstm_recurrence)
    return sequence_cases("mlstm", run, truth, inputs, state="state_BHKW", options={})


def _in_one_unit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The state as C and n; the unit in which an implementation holds them is its own affair."""

    def run(*, state_BHKW: torch.Tensor | None = None, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        initial = None
        if state_BHKW is not None:
            initial = state_BHKW[..., :-1], state_BHKW[..., -1], torch.zeros_like(state_BHKW[..., 0, :1])
        output, (C, n, m) = function(**tensors, initial_state=initial)
        return output, torch.cat([C, n[..., None]], dim=-1) * torch.exp(m)[..., None]

    return run
