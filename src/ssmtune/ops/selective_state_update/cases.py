"""What a step of Mamba-2 must get right."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, named_outputs, step_case
from ssmtune.ops.mamba2_chunk_scan import mamba2_recurrence
from ssmtune.ops.mamba2_chunk_scan.cases import OPTIONS, inputs
from ssmtune.ops.selective_state_update import selective_state_update


def cases() -> list[Case]:
    """Return the case of one step."""

    def step(t: Tensors, state: torch.Tensor) -> torch.Tensor:
        x, dt, B, C = (t[name][:, 0] for name in ("x_BTHP", "dt_BTH", "B_BTGN", "C_BTGN"))
        y = selective_state_update(
            state,
            x,
            dt,
            t["A_H"],
            B,
            C,
            D_H=t["D_H"],
            dt_bias_H=t["dt_bias_H"],
            dt_softplus=True,
            dt_limit=(0.001, 5.0),
        )
        return y[:, None]

    tensors = inputs(torch.Generator().manual_seed(9), 1)
    truth = named_outputs(mamba2_recurrence, OPTIONS)
    return [step_case("selective_state_update", step, truth, tensors, "initial_states_BHPN")]
