"""The contracts of the fused kernels of mamba_ssm in plain PyTorch: they read the weights of modules that they swallow.

Dimensions: B batch, T time, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.mamba1_selective_scan import mamba1_selective_scan
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan


def mamba2_fused(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    *,
    rmsnorm_weight: torch.Tensor | None,
    rmsnorm_eps: float | None,
    outproj_weight: torch.Tensor,
    outproj_bias: torch.Tensor | None,
    headdim: int,
    ngroups: int,
    activation: str,
    **_: Any,
) -> torch.Tensor:
    """mamba_split_conv1d_scan_combined: out_proj as well, [B, T, C] to [B, T, hidden]; one group, gate after the scan."""
    num_heads = A.shape[0]
    inner = num_heads * headdim
    state = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    z, xBC, dt = zxbcdt.split([inner, conv1d_weight.shape[0], num_heads], dim=-1)
    xBC = causal_conv1d(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation).transpose(1, 2)
    x, B, C = xBC.split([inner, ngroups * state, ngroups * state], dim=-1)
    batch, num_steps, _ = x.shape
    y, _ = mamba2_chunk_scan(
        x.reshape(batch, num_steps, num_heads, headdim),
        dt,
        A,
        B.reshape(batch, num_steps, ngroups, state),
        C.reshape(batch, num_steps, ngroups, state),
        D_H=D,
        dt_bias_H=dt_bias,
        dt_softplus=True,
    )
    gated = y.reshape(batch, num_steps, inner) * F.silu(z)
    if rmsnorm_weight is not None:
        gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + rmsnorm_eps) * rmsnorm_weight
    return F.linear(gated, outproj_weight, outproj_bias)


def mamba1_fused(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    _B: None,
    _C: None,
    D: torch.Tensor,
    *,
    delta_bias: torch.Tensor,
    delta_softplus: bool,
) -> torch.Tensor:
    """mamba_inner_fn: x_proj, dt_proj and out_proj as well, [B, 2C, T] to [B, T, hidden]."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    rank, size = delta_proj_weight.shape[1], A.shape[1]
    dt, B, C = F.linear(x.transpose(1, 2), x_proj_weight).split([rank, size, size], dim=-1)
    y, _ = mamba1_selective_scan(
        x,
        delta_proj_weight @ dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D_D=D,
        z_BDT=z,
        dt_bias_D=delta_bias,
        dt_softplus=delta_softplus,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


FUSED_KERNELS = {"mamba2_split_conv1d_scan_combined": mamba2_fused, "mamba_inner_fn": mamba1_fused}
"""By the names under which the layers of transformers call them."""
