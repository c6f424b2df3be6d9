"""What the gated delta rule and its step must get right. Dimensions: B batch, T time, H heads, K key, V value width."""

from __future__ import annotations

from functools import partial

import torch

from ssmtune.ops.case import Case, Tensors, draw, named_outputs, sequence_cases, step_case
from ssmtune.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrence, gated_delta_rule_update

OPTIONS = {"qk_l2norm": True}


def inputs(generator: torch.Generator, num_steps: int, *, decay_shape: tuple[int, ...] = ()) -> Tensors:
    """Return the arguments, the initial state included; two heads of q and k serve four of v."""
    return {
        "q_BTHK": draw(generator, 2, num_steps, 2, 5),
        "k_BTHK": draw(generator, 2, num_steps, 2, 5),
        "v_BTHV": draw(generator, 2, num_steps, 4, 3),
        "g": -torch.exp(draw(generator, 2, num_steps, 4, *decay_shape) - 2),
        "beta_BTH": 2 * draw(generator, 2, num_steps, 4).sigmoid(),
        "initial_state_BHKV": draw(generator, 2, 4, 5, 3),
    }


def cases() -> list[Case]:
    """Return the cases for a decay per head and per key channel (`_kda`), and of one step of each.

    The kernels, which serve a decay per head, round what is written to states, states, and operands of products between them.
    """

    def step(t: Tensors, state: torch.Tensor) -> torch.Tensor:
        names = ("q_BTHK", "k_BTHK", "v_BTHV", "g", "beta_BTH")
        return gated_delta_rule_update(state, *(t[name][:, 0] for name in names), qk_l2norm=True)[:, None]

    name, truth = "initial_state_BHKV", named_outputs(gated_delta_rule_recurrence, OPTIONS)
    found = []
    for suffix, shape in (("", ()), ("_kda", (5,))):
        draws = partial(inputs, decay_shape=shape)
        found += sequence_cases(
            "gated_delta_rule" + suffix,
            gated_delta_rule,
            gated_delta_rule_recurrence,
            draws,
            state=name,
            options=OPTIONS,
            kernel_stages=1 if shape else 4,
        )
        tensors = draws(torch.Generator().manual_seed(9), 1)
        found.append(step_case(f"gated_delta_rule{suffix}_update", step, truth, tensors, name))
    return found
