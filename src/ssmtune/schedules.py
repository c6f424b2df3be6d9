"""What edits do in training beside their gradient: a penalty on the loss, and what they decide after a step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from ssmtune.methods.base import Scheduled

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel


class Schedules:
    """The scheduled edits of a model; those of one method with equal options decide together."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.groups: dict[str, list[Scheduled]] = {}
        for site in adapted.plan.sites:
            edit = adapted.edits.get(site.key)
            if isinstance(edit, Scheduled):
                name = f"{site.method} {json.dumps(dict(site.options), sort_keys=True)}"
                self.groups.setdefault(name, []).append(edit)

    def penalty(self) -> torch.Tensor | float:
        """Return the mean of the edits' penalties, a scalar; 0.0 where no edit is scheduled."""
        penalties = [edit.penalty() for group in self.groups.values() for edit in group]
        if not penalties:
            return 0.0
        return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).mean()

    def after_step(self, step: int, num_steps: int) -> None:
        """Tell every group that optimiser step `step` of `num_steps` (counted from 1) was made; its gradients are still there."""
        for edits in self.groups.values():
            edits[0].after_step(edits, step, num_steps)
