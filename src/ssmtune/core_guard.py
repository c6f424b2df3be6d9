"""A bound on how far training may move A_log: the decay per token stays where a state neither freezes nor dies.

Ours; no paper states it. The rate exp(A_log) dt, with dt taken where the input adds nothing (softplus(dt_bias); S4D:
exp(log_dt)), is kept within [1e-4, 30]. Above it a state is forgotten within its token (e^-30 is below the rounding of
fp32 against 1), and its gradient with it, so that it could not come back. Below it a state outlives 10,000 tokens and
only sums up. The bound is put on the delta after each optimiser step, outside the graph: inside the forward it would
give what lies beyond it no gradient, and cost every pass. What the base already has outside is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ssmtune.base_tensors import base_tensor, owner_of
from ssmtune.families.base import find_family
from ssmtune.inventory import take_inventory
from ssmtune.methods._delta import Delta
from ssmtune.methods._sparse import Sparse
from ssmtune.models import weightless

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel

SLOWEST, FASTEST = 1e-4, 30.0
STEPS = {"ssm.A_log": "ssm.dt_bias", "gdn.A_log": "gdn.dt_bias", "ssm.log_A_real": "ssm.log_dt"}
"""Role of a logarithm of A -> role of what its step is made of."""


class DecayGuard:
    """Holds the deltas of A_log within the bound; `num_held` says how often an element was held back.

    RG-LRU and RWKV decay by other parameters and are not guarded, nor is a gate that a sigmoid bounds, nor a core that
    trains in place.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        config = adapted.base_model.model.config
        self.model = adapted.base_model.model
        self.held: torch.Tensor | None = None
        self.guarded: list[tuple[Delta | Sparse, str, str, bool]] = []
        sites = [s for s in adapted.plan.sites if s.role in STEPS and isinstance(adapted.edits[s.key], (Delta, Sparse))]
        if not sites or find_family(config.model_type)[1].decay_bound(config.get_text_config()) is not None:
            return
        paths = {(c.layer, c.role): c.path for c in take_inventory(weightless(config)).components}
        for site in sites:
            edit = adapted.edits[site.key]
            assert isinstance(edit, (Delta, Sparse))
            step_role = STEPS[site.role]
            self.guarded.append((edit, site.path, paths[site.layer, step_role], step_role == "ssm.log_dt"))

    @property
    def num_held(self) -> int:
        """Elements held back, counted once for every step at which they were."""
        return 0 if self.held is None else int(self.held)

    @torch.no_grad()
    def apply(self) -> None:
        """Put every delta that has left the bound back onto it, in place."""
        for delta, low, high in self._bounds():
            inside = delta.clamp(low, high)
            num = (inside != delta).sum()
            self.held = num if self.held is None else self.held + num
            delta.copy_(inside)

    def _bounds(self) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]:
        """Each delta with the least and the largest value that it may have; zero is always among them."""
        for edit, path, step_path, is_log in self.guarded:
            A_log = base_tensor(self.model, path).float()
            owner, name = owner_of(self.model, step_path)
            raw = getattr(owner, name).float()
            dt = raw.exp() if is_log else F.softplus(raw)
            # One dt a channel or head; where a head's channels have one each (KDA), all of them stay within the bound.
            shape = {1: A_log.shape, 4: A_log.shape}.get(A_log.dim(), (*A_log.shape[:-1], 1))
            num = math.prod(shape)
            fastest, slowest = (dt.view(num, -1).amax(1).view(shape), dt.view(num, -1).amin(1).view(shape))
            low = ((SLOWEST / slowest).log() - A_log).clamp(max=0)
            high = ((FASTEST / fastest).log() - A_log).clamp(min=0)
            if isinstance(edit, Delta):
                yield edit.delta, low, high
            elif edit.dense is not None:
                yield edit.dense, low, high
            else:
                yield edit.delta, low.flatten()[edit.positions], high.flatten()[edit.positions]
