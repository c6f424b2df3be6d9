"""One decoding step of the Mamba-2 recurrence on NVIDIA GPUs, in one kernel."""

from __future__ import annotations

import math

import torch
import triton

from ssmtune.ops.selective_state_update.kernels import step_kernel


def selective_state_update(
    state_BHPN: torch.Tensor,
    x_BHP: torch.Tensor,
    dt_BH: torch.Tensor,
    A_H: torch.Tensor,
    B_BGN: torch.Tensor,
    C_BGN: torch.Tensor,
    *,
    D_H: torch.Tensor | None = None,
    dt_bias_H: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16, no gradients."""
    batch, heads, width, size = state_BHPN.shape
    y = torch.empty(batch, heads, width, dtype=x_BHP.dtype, device=x_BHP.device)
    block_n = triton.next_power_of_2(size)
    block_p = min(triton.next_power_of_2(width), max(1, 4096 // block_n))
    step_kernel[(-(-width // block_p), heads, batch)](
        state_BHPN, x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, dt_bias_H, y, heads, heads // B_BGN.shape[1], width, size,
        float(dt_limit[0]), float(dt_limit[1]), *state_BHPN.stride(), *x_BHP.stride(), *dt_BH.stride(), A_H.stride(0),
        *B_BGN.stride(), *C_BGN.stride(), 0 if D_H is None else D_H.stride(0),
        0 if dt_bias_H is None else dt_bias_H.stride(0), SOFTPLUS=dt_softplus,
        LIMITED=tuple(dt_limit) != (0.0, math.inf), HAS_D=D_H is not None, HAS_BIAS=dt_bias_H is not None,
        BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y
