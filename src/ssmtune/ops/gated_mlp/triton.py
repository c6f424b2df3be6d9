"""The gated MLP on NVIDIA GPUs: the frozen products by cuBLAS, everything between them in one kernel each way.

Kept for the backward pass: x, the inner projection without its low-rank term, and the low-rank inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_mlp.kernels import gate_back_kernel, gate_kernel
from ssmtune.ops.gated_rms_norm import triton as norms
from ssmtune.ops.launch import launch
from ssmtune.ops.precision import multiplies_exactly
from ssmtune.ops.projection.spec import LowRank, Normed
from ssmtune.ops.projection.triton import add_low_rank, fp32_product, product, rank_block, rounded_factors

BLOCK = {"BLOCK_T": 32, "BLOCK_K": 128, "num_warps": 4}


def gated_mlp(
    x: torch.Tensor,
    norm: Normed,
    in_weight_2KD: torch.Tensor,
    out_weight_DK: torch.Tensor,
    in_low_rank: LowRank | None,
    out_low_rank: LowRank | None,
    multiplier: float,
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    assert in_low_rank is not None and out_low_rank is not None
    y: torch.Tensor = _Mlp.apply(  # type: ignore[no-untyped-call]
        x,
        norm.weight_D,
        in_weight_2KD,
        out_weight_DK,
        in_low_rank.A,
        in_low_rank.B,
        out_low_rank.A,
        out_low_rank.B,
        *rounded_factors(in_low_rank, x.dtype),
        *rounded_factors(out_low_rank, x.dtype),
        (norm.eps, in_low_rank.scale, out_low_rank.scale, multiplier),
    )
    return y


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        x, norm_weight, in_weight, out_weight, _, _, _, _, in_A, in_B, out_A, out_B, numbers = given
        eps, _, _, m = numbers
        flat = x.flatten(0, -2)
        p = norms.run_forward(flat, norm_weight, None, eps, norm_weight.shape[0])
        wide, v = torch.mm(p, in_weight.t()), torch.mm(p, in_A.t())
        value = torch.empty(flat.shape[0], out_weight.shape[1], dtype=x.dtype, device=x.device)
        launch(gate_kernel, _grid(value), wide, v, in_B, value, *value.shape, v.shape[1], **_options(value, v))
        y = torch.addmm(flat, value, out_weight.t(), alpha=m)
        out_v = torch.mm(value, out_A.t())
        add_low_rank(y, out_v, out_B.t(), m)
        ctx.save_for_backward(x, norm_weight, in_weight, out_weight, in_A, in_B, out_A, out_B, wide, v, out_v)
        ctx.numbers = numbers
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, norm_weight, in_weight, out_weight, in_A, in_B, out_A, out_B, wide, v, out_v = ctx.saved_tensors
        eps, in_scale, out_scale, m = ctx.numbers
        flat = dy.reshape(-1, dy.shape[-1])
        out_dv = product(flat, out_B, m)
        d_out_B = fp32_product(flat.t(), out_v, m * out_scale)
        dvalue = product(flat, out_weight, m)
        dwide, value = torch.empty_like(wide), torch.empty_like(dvalue)
        launch(
            gate_back_kernel, _grid(value), wide, v, in_B, dvalue, out_dv, out_A, dwide, value, *value.shape, v.shape[1],
            out_v.shape[1], OUT_RANK=rank_block(out_v), **_options(value, v),
        )  # fmt: skip
        d_out_A = fp32_product(out_dv.t(), value, 1.0)
        dv = torch.mm(dwide, in_B)
        d_in_B = fp32_product(dwide.t(), v, in_scale)
        dp = torch.mm(dwide, in_weight)
        add_low_rank(dp, dv, in_A, 1.0)
        rows = x.reshape(-1, x.shape[-1])
        dx, _, _, p = norms.run_backward(dp, rows, norm_weight, None, eps, norm_weight.shape[0], again=True, added=flat)
        assert p is not None
        d_in_A = fp32_product(dv.t(), p, 1.0)
        return dx.view(x.shape), None, None, None, d_in_A, d_in_B, d_out_A, d_out_B, *(None,) * 5


def _grid(value: torch.Tensor) -> tuple[int, int]:
    rows, width = value.shape
    return int(triton.cdiv(width, BLOCK["BLOCK_K"])), int(triton.cdiv(rows, BLOCK["BLOCK_T"]))


def _options(value: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    return {"EXACT": multiplies_exactly(value), "RANK": rank_block(v), **BLOCK}
