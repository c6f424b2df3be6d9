"""One decoding step of the Mamba-1 recurrence on NVIDIA GPUs, in one kernel."""

from __future__ import annotations

import torch
import triton

from ssmtune.ops.mamba1_selective_scan.step_kernels import step_kernel


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
    """The reference's function with the reference's arguments; fp32 and bf16, no gradients."""
    batch, channels, size = state_BDN.shape
    y = torch.empty(batch, channels, dtype=x_BD.dtype, device=x_BD.device)
    block_n = triton.next_power_of_2(size)
    block_d = max(1, 1024 // block_n)
    step_kernel[(-(-channels // block_d), batch)](
        state_BDN, x_BD, dt_BD, A_DN, B_BN, C_BN, D_D, z_BD, dt_bias_D, y, channels, size, *state_BDN.stride(),
        *x_BD.stride(), *dt_BD.stride(), *A_DN.stride(), *B_BN.stride(), *C_BN.stride(),
        0 if D_D is None else D_D.stride(0), *((0, 0) if z_BD is None else z_BD.stride()),
        0 if dt_bias_D is None else dt_bias_D.stride(0), SOFTPLUS=dt_softplus, HAS_SKIP=D_D is not None,
        HAS_Z=z_BD is not None, HAS_BIAS=dt_bias_D is not None, BLOCK_D=block_d, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return y
