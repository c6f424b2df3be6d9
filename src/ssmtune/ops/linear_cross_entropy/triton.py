"""The loss of an output head on NVIDIA GPUs: a share of the tokens at a time, its gradient found on the way forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ssmtune.ops.launch import launch
from ssmtune.ops.linear_cross_entropy.kernels import loss_kernel

LOGITS_BYTES = 256 * 2**20
"""What one share's logits may take: large enough to fill the GPU, small beside a model."""

BLOCK = {"BLOCK": 4096, "num_warps": 8}
ROW = 8
"""The weight has a multiple of so many rows, or gets them for the call."""


def linear_cross_entropy(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The reference's function with the reference's arguments; fp32 and bf16."""
    loss: torch.Tensor = _Loss.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        num, vocab = hidden.shape[0], weight.shape[0]
        back = ctx.needs_input_grad[0]
        # The vocabulary is a dimension of both products: where it is odd, cuBLAS falls back to its slowest kernels, wherever
        # rows begin. The added rows are zero, and so are their logits, which the loss kernel neither reads nor writes: they
        # add zero to the gradient.
        weight = F.pad(weight, (0, 0, 0, -vocab % ROW)) if vocab % ROW else weight
        losses = torch.empty(num, dtype=torch.float32, device=hidden.device)
        grad = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if back else None
        share = max(1, LOGITS_BYTES // (weight.shape[0] * hidden.element_size()))
        memory = torch.empty(min(share, num), weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        for first in range(0, num, share):
            some = slice(first, first + share)
            logits = memory[: num - first]
            torch.mm(hidden[some], weight.t(), out=logits)
            launch(
                loss_kernel,
                (logits.shape[0],),
                logits,
                targets[some].contiguous(),
                losses[some],
                vocab,
                logits.stride(0),
                BACK=back,
                **BLOCK,
            )
            if grad is not None:
                torch.mm(logits, weight, out=grad[some])
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        # Not in bf16: one over the number of targets, rounded to that, would scale every gradient of a step alike.
        return (grad.float() * upstream).to(grad.dtype), None, None
