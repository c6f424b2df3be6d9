"""The mixer on NVIDIA GPUs: products by cuBLAS, the rest in the kernels of the operations that it is made of.

Kept for the backward pass: x, what the inner projection gave, what the scan gave, and the low-rank inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ssmtune.ops.gated_rms_norm import triton as norms
from ssmtune.ops.mamba2_chunk_scan.stages import shape_of
from ssmtune.ops.mamba2_chunk_scan.triton import Inputs, run_forward
from ssmtune.ops.mamba2_conv_scan import reference as conv_scan
from ssmtune.ops.mamba2_conv_scan.triton import conv_scan_backward, convolve
from ssmtune.ops.mamba2_mixer.reference import split
from ssmtune.ops.mamba2_mixer.spec import Adapted, Core
from ssmtune.ops.projection.spec import dense
from ssmtune.ops.projection.triton import add_low_rank, fp32_product, product, rounded_factors


def mamba2_mixer(
    x_BTD: torch.Tensor,
    inner: Adapted,
    core: Core,
    outer: Adapted,
    *,
    residual: bool,
    multiplier: float,
    seq_idx: torch.Tensor | None,
) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    assert inner.low_rank is not None and outer.low_rank is not None
    seq = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    y: torch.Tensor = _Mixer.apply(  # type: ignore[no-untyped-call]
        x_BTD,
        core.A_H,
        core.D_H,
        core.dt_bias_H,
        inner.low_rank.A,
        inner.low_rank.B,
        outer.low_rank.A,
        outer.low_rank.B,
        rounded_factors(inner.low_rank, x_BTD.dtype),
        rounded_factors(outer.low_rank, x_BTD.dtype),
        inner,
        core,
        outer,
        residual,
        multiplier,
        seq,
    )
    return y


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, A: Any, D: Any, dt_bias: Any, *given: Any) -> torch.Tensor:
        *_, (in_A, in_B), (out_A, out_B), inner, core, outer, residual, m, seq = given
        flat = x.flatten(0, -2)
        p = norms.run_forward(flat, inner.norm.weight_D, None, inner.norm.eps, flat.shape[1])
        wide, v = torch.mm(p, dense(inner.weight_OI).t()), torch.mm(p, in_A.t())
        add_low_rank(wide, v, in_B.t(), 1.0)
        projected = wide.view(*x.shape[:-1], -1)
        gate, xBC, dt = split(projected, core)
        mixed = convolve(xBC, core.conv_weight_CK, core.conv_bias_C, seq)
        into, B, C = conv_scan.split(mixed, A.shape[0], core.groups, core.state)
        t = Inputs(into, dt, A, B, C, D, dt_bias, None, seq, None)
        y, _, small = run_forward(shape_of(t.x, t.B, True, core.dt_limit), t)
        y = y.flatten(2)
        gated = norms.run_forward(y, outer.norm.weight_D, gate, outer.norm.eps, _group(outer)).flatten(0, -2)
        out_v = torch.mm(gated, out_A.t())
        out = product(gated, dense(outer.weight_OI).t(), m)
        add_low_rank(out, out_v, out_B.t(), m, flat if residual else None)
        # The frozen weights are the model's own and outlive every pass; nobody writes to them in between.
        ctx.inner, ctx.core, ctx.outer = (_detached(part) for part in (inner, core, outer))
        ctx.settings = residual, m
        ctx.save_for_backward(x, A, D, dt_bias, in_A, in_B, out_A, out_B, seq, projected, y, v, out_v, *small)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        x, A, D, dt_bias, in_A, in_B, out_A, out_B, seq, projected, y, v, out_v, *small = ctx.saved_tensors
        inner, core, outer = ctx.inner, ctx.core, ctx.outer
        residual, m = ctx.settings
        gate, xBC, dt = split(projected, core)
        dprojected = torch.empty_like(projected)
        dgate, dxBC, ddt = split(dprojected, core)

        flat = dout.reshape(-1, dout.shape[-1])
        out_dv = product(flat, out_B, m)
        d_out_B = fp32_product(flat.t(), out_v, m * outer.low_rank.scale)
        dgated = product(flat, dense(outer.weight_OI), m)
        add_low_rank(dgated, out_dv, out_A, 1.0)
        dy, _, _, gated = norms.run_backward(
            dgated.view(y.shape), y, outer.norm.weight_D, gate, outer.norm.eps, _group(outer), again=True, dgate=dgate
        )
        assert gated is not None
        d_out_A = fp32_product(out_dv.t(), gated.flatten(0, -2), 1.0)

        conv, sizes = (core.conv_weight_CK, core.conv_bias_C), (A.shape[0], core.groups, core.state)
        dA, dD, ddt_bias, _, _ = conv_scan_backward(
            dy, xBC, dt, A, *conv, D, dt_bias, seq, small, sizes, core.dt_limit, dxBC, ddt, trains=False
        )

        wide = dprojected.flatten(0, -2)
        dv = torch.mm(wide, in_B)
        d_in_B = fp32_product(wide.t(), v, inner.low_rank.scale)
        rows, eps, dx = x.flatten(0, -2), inner.norm.eps, None
        if ctx.needs_input_grad[0]:
            dp = torch.mm(wide, dense(inner.weight_OI))
            add_low_rank(dp, dv, in_A, 1.0)
            added = flat if residual else None
            dx, _, _, p = norms.run_backward(
                dp, rows, inner.norm.weight_D, None, eps, rows.shape[1], again=True, added=added
            )
            assert p is not None
            dx = dx.view(x.shape)
        else:
            p = norms.run_forward(rows, inner.norm.weight_D, None, eps, rows.shape[1])
        d_in_A = fp32_product(dv.t(), p, 1.0)
        return dx, dA, dD, ddt_bias, d_in_A, d_in_B, d_out_A, d_out_B, *(None,) * 8


def _group(outer: Adapted) -> int:
    return outer.norm.weight_D.shape[0] if outer.norm.size is None else outer.norm.size


def _detached(part: Any) -> Any:
    """The same without what autograd follows, which a context must not hold."""
    return part._replace(
        **{n: value.detach() for n, value in part._asdict().items() if isinstance(value, torch.Tensor)}
    )
