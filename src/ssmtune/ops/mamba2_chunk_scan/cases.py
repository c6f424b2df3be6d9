"""What the Mamba-2 scan must get right. Dimensions: B batch, T time, H heads, P head width, G groups, N state size."""

from __future__ import annotations

import torch

from ssmtune.ops.case import Case, Tensors, draw, sequence_cases
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan, mamba2_recurrence

OPTIONS = {"dt_softplus": True, "dt_limit": (0.001, 5.0)}


def inputs(generator: torch.Generator, num_steps: int) -> Tensors:
    """Return the arguments, the initial state included."""
    return {
        "x_BTHP": draw(generator, 2, num_steps, 6, 5),
        "dt_BTH": draw(generator, 2, num_steps, 6),
        "A_H": -draw(generator, 6).exp(),
        "B_BTGN": draw(generator, 2, num_steps, 2, 7),
        "C_BTGN": draw(generator, 2, num_steps, 2, 7),
        "D_H": draw(generator, 6),
        "dt_bias_H": draw(generator, 6) - 2,
        "initial_states_BHPN": draw(generator, 2, 6, 5, 7),
    }


def cases() -> list[Case]:
    """Return the cases of the scan; its kernels round states, gradients of states and operands of products between them."""
    return sequence_cases(
        "mamba2_chunk_scan",
        mamba2_chunk_scan,
        mamba2_recurrence,
        inputs,
        state="initial_states_BHPN",
        options=OPTIONS,
        kernel_stages=4,
    )
