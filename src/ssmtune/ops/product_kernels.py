"""The product of two blocks inside a Triton kernel, in the precision that the kernel's tensors ask for."""

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, EXACT: tl.constexpr):
    """a @ b, summed in fp32: of operands rounded to bf16, or of fp32 ones split in three, which keeps their precision."""
    if EXACT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
