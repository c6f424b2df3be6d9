"""Triton kernels of the gated root-mean-square norm."""

import triton
import triton.language as tl


@triton.jit
def _gated(x_ptr, gate_ptr, row, x_row, gate_row, at, inside, HAS_GATE: tl.constexpr):
    """The input, the gate, its sigmoid, and their product x silu(gate), fp32."""
    x = tl.load(x_ptr + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    gate, sigmoid, value = x, x, x
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        value = x * gate * sigmoid
    return x, gate, sigmoid, value


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(x_ptr, gate_ptr, weight_ptr, y_ptr, num_rows, size, x_row, gate_row, y_row, eps,
                   HAS_GATE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write weight * norm(x silu(gate)). Grid (rows, groups)."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = group * size + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < size
    _, _, _, value = _gated(x_ptr, gate_ptr, row, x_row, gate_row, at, inside, HAS_GATE)
    scale = 1 / tl.sqrt(tl.sum(value * value) / size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * y_row + at, value * scale * weight, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def norm_back_kernel(x_ptr, gate_ptr, weight_ptr, dy_ptr, dx_ptr, dgate_ptr, dweight_ptr, y_ptr, added_ptr, num_rows,
                     rows_each, size, x_row, gate_row, dy_row, dx_row, dgate_row, added_row, eps,
                     HAS_GATE: tl.constexpr, TRAINS: tl.constexpr, AGAIN: tl.constexpr, ADDS: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Write dx and dgate, with TRAINS dweight by program [programs, D], with AGAIN the forward's result, dense.

    With ADDS, `added` is added to dx where there is no gate.

    Grid (programs, groups).
    """
    group = tl.program_id(1)
    at = group * size + tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK) < size
    weight = tl.load(weight_ptr + at, mask=column, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    for turn in range(rows_each):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        inside = tl.arange(0, BLOCK) < tl.where(row < num_rows, size, 0)
        x, gate, sigmoid, value = _gated(x_ptr, gate_ptr, row, x_row, gate_row, at, inside, HAS_GATE)
        dy = tl.load(dy_ptr + row * dy_row + at, mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(value * value) / size + eps)
        if TRAINS:
            dweight += dy * value * scale
        if AGAIN:
            tl.store(y_ptr + row * dx_row + at, value * scale * weight, mask=inside)
        along = dy * weight
        dvalue = scale * (along - value * (scale * scale * tl.sum(along * value) / size))
        if HAS_GATE:
            silu = gate * sigmoid
            tl.store(dx_ptr + row * dx_row + at, dvalue * silu, mask=inside)
            tl.store(dgate_ptr + row * dgate_row + at, dvalue * x * (sigmoid + silu * (1 - sigmoid)), mask=inside)
        else:
            if ADDS:
                dvalue += tl.load(added_ptr + row * added_row + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * dx_row + at, dvalue, mask=inside)
    if TRAINS:
        width = tl.num_programs(1) * size
        tl.store(dweight_ptr + tl.program_id(0) * width + at, dweight, mask=column)
