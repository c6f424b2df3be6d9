"""The loss of an adapted model over the positions that have a target, through its own head or one that holds no logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.fast._marks import LOSS, component
from ssmtune.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel

LARGE = 1e4
"""Far beyond any cap on logits, so that a capped head shows."""


class HeadLoss:
    """Summed cross entropy of an adapted model, found once to be computable without logits or not.

    A head is bypassed on a GPU where it is a frozen linear and the model does nothing to its logits but scale them:
    scaling the hidden states instead is the same. `reason` says why another head is run as it stands.
    """

    def __init__(self, adapted: AdaptedModel, *, bypass: bool | None = None) -> None:
        """`bypass` overrides the choice by device: True also on a CPU."""
        self.adapted = adapted
        wanted = adapted.device.type == "cuda" if bypass is None else bypass
        self.reason = _refusal(adapted) if wanted else f"runs on {adapted.device.type}"

    def __call__(
        self, model: Any, inputs: dict[str, Any], positions: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum over `targets` [n], fp32, of what is predicted at the flat `positions` [n] of `inputs`.

        `model` is the adapted model, or what a trainer has put around it.
        """
        if self.reason is not None:
            with head_on(self.adapted, positions):
                logits = model(**inputs, use_cache=False).logits
            return F.cross_entropy(logits.float(), targets, reduction="sum")
        head: Any = self.adapted.get_output_embeddings()
        with _head_replaced(head, lambda hidden: hidden.flatten(0, 1)[positions]):
            hidden = model(**inputs, use_cache=False).logits
        with component(LOSS):
            return linear_cross_entropy(hidden.to(head.weight.dtype), head.weight, targets)


@contextmanager
def head_on(adapted: AdaptedModel, positions: torch.Tensor) -> Iterator[None]:
    """While the block runs, the output head sees only the hidden states [B, T, d] at the flat `positions` [n], as [n, d]."""

    def select(head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, 1)[positions],)

    handle = adapted.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _head_replaced(head: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While the block runs, this instance of a head computes `forward`."""
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        vars(head).pop("forward", None)


def _refusal(adapted: AdaptedModel) -> str | None:
    """Why the head must be run as it stands, or None."""
    head = adapted.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}"
    if head.bias is not None:
        return "the head has a bias"
    if head.weight.requires_grad or nn.utils.parametrize.is_parametrized(head):
        return "the head trains"
    given: list[torch.Tensor] = []

    def enlarge(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden.float() * LARGE)
        return given[-1]

    tokens = torch.ones(1, 2, dtype=torch.long, device=adapted.device)
    with torch.no_grad(), _head_replaced(head, enlarge):
        returned = adapted(input_ids=tokens, use_cache=False).logits.float()
    factor = (returned * given[0]).sum() / given[0].square().sum()
    # Two bf16 roundings apart at most; a cap or a bias is off by far more at this size.
    is_scaled = torch.allclose(returned, factor * given[0], rtol=2**-7, atol=LARGE * 1e-5)
    return None if is_scaled else "the model does more to its logits than scale them"
