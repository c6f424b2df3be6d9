"""A low-rank change as weighted triplets, and the allocation of a common budget of triplets among many such changes.

Dimensions: r rank, I inputs, O outputs of the tensor, R rows of the site.
Sources: Zhang et al., "AdaLoRA", ICLR 2023, section 3.1 (equations 3 and 4), 3.2 (8 to 10, and the importance of a
triplet, 7) and 3.3 (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ssmtune.methods._low_rank import put_rows, take_rows
from ssmtune.methods.base import Rows

if TYPE_CHECKING:
    from ssmtune.methods.adalora import AdaloraOptions


class Adaptive(nn.Module):
    """The effective tensor is W + s P diag(lambda) Q on the rows of the site, summed in fp32 and rounded once.

    P [R, r] and Q [r, I] start normal, their columns and rows of mean square norm one; lambda [r] starts at zero. A
    pruned triplet is one whose lambda has been set to zero: while allocations go on, a gradient may bring it back.
    `after_step` is the only writer of the buffers, which nothing but training reads.
    """

    enabled = True

    def __init__(self, weight: torch.Tensor, rows: Rows, options: AdaloraOptions) -> None:
        super().__init__()
        self.rows = rows
        self.options = options
        self.scale = options.alpha / options.rank
        num_out, num_in = take_rows(weight, rows).shape
        self.lora_P = nn.Parameter(torch.randn(num_out, options.rank) / num_out**0.5)
        self.lora_lambda = nn.Parameter(torch.zeros(options.rank))
        self.lora_Q = nn.Parameter(torch.randn(options.rank, num_in) / num_in**0.5)
        for name, parameter in list(self.trained().items()):
            letter = name.removeprefix("lora_")
            self.register_buffer(f"sensitivity_{letter}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"uncertainty_{letter}", torch.zeros_like(parameter, requires_grad=False))
        self.register_buffer("kept", torch.ones(options.rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [O, I] in the weight's dtype; the weight itself where the edit is switched off."""
        if not self.enabled:
            return weight
        value = weight.float()
        change = self.scale * (self.lora_P * self.lora_lambda) @ self.lora_Q
        return put_rows(value, self.rows, take_rows(value, self.rows) + change).to(weight.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """The three parts of the triplets."""
        return {"lora_P": self.lora_P, "lora_lambda": self.lora_lambda, "lora_Q": self.lora_Q}

    def progress(self) -> frozenset[str]:
        """Names of all buffers: a continuation needs them, the trained adapter does not."""
        return frozenset(self._buffers)

    @property
    def rank(self) -> int:
        """Number of triplets that act."""
        return int(self.lora_lambda.count_nonzero())

    def penalty(self) -> torch.Tensor:
        """gamma (|P^T P - I|^2 + |Q Q^T - I|^2), Frobenius norms; equation 4."""
        identity = torch.eye(self.options.rank, device=self.lora_P.device)
        both = (self.lora_P.T @ self.lora_P - identity, self.lora_Q @ self.lora_Q.T - identity)
        return self.options.gamma * torch.stack([part.square().sum() for part in both]).sum()

    def observe(self) -> None:
        """Take the gradients of this step into the moving averages; equations 8 to 10."""
        beta1, beta2 = self.options.beta1, self.options.beta2
        for name, parameter in self.trained().items():
            letter = name.removeprefix("lora_")
            assert parameter.grad is not None, name
            now = (parameter * parameter.grad).abs()
            sensitivity, uncertainty = (
                self.get_buffer(f"sensitivity_{letter}"),
                self.get_buffer(f"uncertainty_{letter}"),
            )
            sensitivity.mul_(beta1).add_((1 - beta1) * now)
            uncertainty.mul_(beta2).add_((1 - beta2) * (now - sensitivity).abs())

    def importance(self) -> torch.Tensor:
        """Return the importance of each triplet, [r]: of its lambda, and the means over its column of P and row of Q."""
        of_P, of_lambda, of_Q = (
            self.get_buffer(f"sensitivity_{letter}") * self.get_buffer(f"uncertainty_{letter}")
            for letter in ("P", "lambda", "Q")
        )
        return of_lambda + of_P.mean(0) + of_Q.mean(1)

    def prune(self) -> None:
        """Set the lambda of every triplet that is not kept to zero, in place."""
        self.lora_lambda.masked_fill_(self.get_buffer("kept") == 0, 0.0)

    @staticmethod
    @torch.no_grad()
    def after_step(edits: Sequence[Adaptive], step: int, num_steps: int) -> None:
        """Observe optimiser step `step` of `num_steps` (from 1), and allocate where it is due; algorithm 1.

        The edits have equal options and one budget. After the last allocation their ranks are held.
        """
        options = edits[0].options
        first, last = options.span(num_steps)
        if step <= last:
            for edit in edits:
                edit.observe()
        if step == last or (first < step < last and step % options.interval == 0):
            allocate(edits, options.budget(len(edits), step, num_steps))
        if step >= last:
            for edit in edits:
                edit.prune()


@torch.no_grad()
def allocate(edits: Sequence[Adaptive], budget: int) -> None:
    """Keep the `budget` most important triplets of all edits together, the earlier of equals, and prune the others."""
    scores = torch.cat([edit.importance().cpu() for edit in edits])
    kept = torch.zeros_like(scores)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = 1.0
    for edit, own in zip(edits, torch.split(kept, [edit.options.rank for edit in edits]), strict=True):
        edit.get_buffer("kept").copy_(own)
        edit.prune()
