"""One decoding step of the Mamba-2 recurrence in plain PyTorch.

Dimensions: B batch, H heads, P head width, G groups, N state size.
"""

from __future__ import annotations

import math

import torch

from ssmtune.ops.mamba2_chunk_scan.reference import step_sizes
from ssmtune.ops.precision import outside_autocast


@outside_autocast
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
    """Return the output of one step, [B, H, P], in the dtype of `x_BHP`, and write the new state into `state_BHPN`.

    The arithmetic is fp32 (fp64 for fp64 inputs) and equals one step of `mamba2_chunk_scan`.
    """
    dtype = torch.promote_types(x_BHP.dtype, torch.float32)
    repeats = x_BHP.shape[1] // B_BGN.shape[1]
    x = x_BHP.to(dtype)
    dt = step_sizes(dt_BH.to(dtype), dt_bias_H, dt_softplus, dt_limit)
    B_BHN = B_BGN.to(dtype).repeat_interleave(repeats, dim=1)
    C_BHN = C_BGN.to(dtype).repeat_interleave(repeats, dim=1)
    decay = torch.exp(A_H.to(dtype) * dt)[..., None, None]
    state = state_BHPN.to(dtype) * decay + (x * dt[..., None])[..., None] * B_BHN[:, :, None, :]
    state_BHPN.copy_(state)
    y = torch.matmul(state, C_BHN[..., None]).squeeze(-1)
    if D_H is not None:
        y = y + x * D_H.to(dtype)[:, None]
    return y.to(x_BHP.dtype)
