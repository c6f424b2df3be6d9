"""Triton kernel of the cross entropy of logits."""

import triton
import triton.language as tl


@triton.jit
def loss_kernel(logits_ptr, target_ptr, loss_ptr, vocab, logits_row, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Write each row's loss, and with BACK its gradient over the logits, in place. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_row
    target = tl.load(target_ptr + row)
    at_target = tl.load(logits_ptr + target).to(tl.float32)
    largest, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        # Lanes that have seen no logit yet: exp of the difference of two infinities is no number.
        total = tl.where(larger == float("-inf"), 0.0, total * tl.exp(largest - larger) + tl.exp(x - larger))
        largest = larger
    top = tl.max(largest, axis=0)
    norm = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    tl.store(loss_ptr + row, norm - at_target)
    if BACK:
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - norm) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits_ptr + at, grad, mask=at < vocab)
