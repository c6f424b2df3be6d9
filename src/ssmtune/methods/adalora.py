"""AdaLoRA: W' = W + (alpha / r) P diag(lambda) Q, whose triplets are ranked over all sites while training, and pruned.

Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, sections 3.1
to 3.3 (`_adaptive.py` has the formulas). Ours: P and Q start with columns and rows of norm one in the mean, where the
penalty wants them; the scale is alpha over the initial rank; the penalty is averaged over the sites, so that gamma does
not depend on their number.
The edit is of the tensor at every site. PEFT's own layer cannot be used: its smoothed importances are in no state dict,
so that a resumed run would allocate other ranks, and it saves fewer rows than it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows
from ssmtune.methods.lora import is_projection
from ssmtune.recipe import EVERY_PROJECTION, Edit

if TYPE_CHECKING:
    import torch
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdaloraOptions:
    """Initial rank r of every site, alpha, and how ranks are allocated.

    `target_rank`: mean over the sites at the end; None is r / 1.5, rounded. `gamma`: weight of the orthogonality
    penalty. `beta1`, `beta2`: smoothing of sensitivity and uncertainty. For `initial_share` of the steps no triplet is
    pruned, for `final_share` the ranks stay as they are; between them there is an allocation every `interval` steps.
    """

    rank: int = pydantic.Field(default=12, ge=1)
    alpha: float = pydantic.Field(default=32.0, gt=0)
    target_rank: int | None = pydantic.Field(default=None, ge=1)
    gamma: float = pydantic.Field(default=0.1, ge=0)
    beta1: float = pydantic.Field(default=0.85, ge=0, lt=1)
    beta2: float = pydantic.Field(default=0.85, ge=0, lt=1)
    initial_share: float = pydantic.Field(default=0.1, ge=0, lt=1)
    final_share: float = pydantic.Field(default=0.4, ge=0, lt=1)
    interval: int = pydantic.Field(default=10, ge=1)

    @property
    def target(self) -> int:
        """The mean rank at the end: what was given, or two thirds of the initial rank.

        >>> AdaloraOptions(rank=12).target, AdaloraOptions(rank=1).target
        (8, 1)
        """
        return max(1, round(self.rank / 1.5)) if self.target_rank is None else self.target_rank

    def span(self, num_steps: int) -> tuple[int, int]:
        """The last step at which every triplet is still there, and the step of the last allocation."""
        return round(self.initial_share * num_steps), max(1, num_steps - round(self.final_share * num_steps))

    def budget(self, num_sites: int, step: int, num_steps: int) -> int:
        """Number of triplets of `num_sites` sites after `step` of `num_steps`, counted from 1.

        All of them, then a cubic, then the target: section 3.3, equation 12 of the paper, with its bounds as shares.
        """
        first, last = self.span(num_steps)
        initial, target = self.rank * num_sites, self.target * num_sites
        # The last allocation first: in a run of a few steps the bounds may meet.
        if step >= last:
            return target
        if step <= first:
            return initial
        return round(target + (initial - target) * ((last - step) / (last - first)) ** 3)


def _make_edit(weight: torch.Tensor, rows: Rows, options: AdaloraOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._adaptive import Adaptive

    return Adaptive(weight, rows, options)


def _refuses(shape: Sequence[int], options: AdaloraOptions) -> str:
    if len(shape) == 3:
        return f"it packs {shape[0]} matrices, as experts do, and triplets are of one ('without' leaves a role out)"
    if options.target > options.rank:
        return f"target_rank {options.target_rank} is above the initial rank {options.rank}"
    if options.initial_share + options.final_share >= 1:
        return f"initial_share {options.initial_share} and final_share {options.final_share} leave no step for an allocation"
    return ""


METHOD = Method(
    in_module=False,
    summary="Triplets P [out, r], lambda [r], Q [r, in], of which the least important over all sites are pruned.",
    formula="r (out + in + 1), with the initial rank r",
    source="Zhang et al. 2023 (AdaLoRA), sections 3.1 to 3.3",
    mergeable=True,
    overhead="none once merged",
    Options=AdaloraOptions,
    allows=is_projection,
    num_params=lambda shape, options: options.rank * (sum(shape[-2:]) + 1),
    optimizer_group="lora",
    waits=("lora_P", "lora_Q"),
    make_edit=_make_edit,
    size_option="rank",
    refuses=_refuses,
    recipes={"adalora": (Edit(method="adalora", select=EVERY_PROJECTION),)},
)
