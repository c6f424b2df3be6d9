"""What Mamba-1's scan and its step must get right. Dimensions: B batch, D channels, T time, N state size."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, draw, named_outputs, sequence_cases, step_case
from ssmtune.ops.mamba1_selective_scan import mamba1_recurrence, mamba1_selective_scan, mamba1_state_update

OPTIONS = {"dt_softplus": True}


def inputs(generator: torch.Generator, num_steps: int) -> Tensors:
    """Return the arguments, the initial state included."""
    return {
        "x_BDT": draw(generator, 2, 9, num_steps),
        "dt_BDT": draw(generator, 2, 9, num_steps),
        "A_DN": -draw(generator, 9, 5).exp(),
        "B_BNT": draw(generator, 2, 5, num_steps),
        "C_BNT": draw(generator, 2, 5, num_steps),
        "D_D": draw(generator, 9),
        "z_BDT": draw(generator, 2, 9, num_steps),
        "dt_bias_D": draw(generator, 9) - 2,
        "initial_state_BDN": draw(generator, 2, 9, 5),
    }


def cases() -> list[Case]:
    """Return the cases of the scan, and of one step."""

    def step(t: Tensors, state: torch.Tensor) -> torch.Tensor:
        x, dt, B, C = (t[name][..., 0] for name in ("x_BDT", "dt_BDT", "B_BNT", "C_BNT"))
        y = mamba1_state_update(
            state,
            x,
            dt,
            t["A_DN"],
            B,
            C,
            D_D=t["D_D"],
            z_BD=t["z_BDT"][..., 0],
            dt_bias_D=t["dt_bias_D"],
            dt_softplus=True,
        )
        return y[..., None]

    name, truth = "initial_state_BDN", named_outputs(mamba1_recurrence, OPTIONS)
    tensors = inputs(torch.Generator().manual_seed(9), 1)
    return [
        *sequence_cases(
            "mamba1_selective_scan", mamba1_selective_scan, mamba1_recurrence, inputs, state=name, options=OPTIONS
        ),
        step_case("mamba1_state_update", step, truth, tensors, name),
    ]
