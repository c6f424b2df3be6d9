"""One decoding step of the Mamba-1 recurrence in plain PyTorch.

Dimensions: B batch, D channels, N state size.
"""

from __future__ import annotations

import torch

from ssmtune.ops.mamba1_selective_scan.reference import skip_and_gate, step_sizes
from ssmtune.ops.precision import outside_autocast


@outside_autocast
def mamba1_state_update(
    state_BDN: torch.Tensor,
    x_BD: torch.Tensor,
    dt_BD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BN: torch.Tensor,
    C_BN: torch.Tensor,
    *,
    D_D: torch.Tensor | None = None,
    z_BD: torch.Tensor | None = None,
    dt_bias_D: torch.Tensor | None = None,
    dt_softplus: bool = False,
) -> torch.Tensor:
    """Return the output of one step, [B, D], in the dtype of `x_BD`, and write the new state into `state_BDN`.

    The arithmetic is fp32 (fp64 for fp64 inputs) and equals one step of `mamba1_selective_scan`.
    """
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    x = x_BD.to(dtype)
    dt = step_sizes(dt_BD.to(dtype)[..., None], dt_bias_D, dt_softplus)
    fed = (x[..., None] * dt) * B_BN.to(dtype)[:, None]
    state = torch.addcmul(fed, torch.exp(dt * A_DN.to(dtype)), state_BDN.to(dtype))
    state_BDN.copy_(state)
    y = torch.matmul(state, C_BN.to(dtype)[..., None]).squeeze(-1)
    return skip_and_gate(y, x, D_D, z_BD, dim=1).to(x_BD.dtype)
