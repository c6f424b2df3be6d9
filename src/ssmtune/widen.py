"""Widen: an adapted model with an additional scan becomes a plain model with that many more states."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.attach import AdaptedModel
from ssmtune.component import Component
from ssmtune.errors import AttachError
from ssmtune.families.base import find_family
from ssmtune.inventory import take_inventory
from ssmtune.merge import merge, merge_tensors
from ssmtune.models import auto_class, weightless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCAN = "state.additional_scan"


def widen(adapted: AdaptedModel) -> PreTrainedModel:
    """Return a plain model of the base's class whose layers have N + n states: the base's and those of the additional scan.

    Every other edit is merged as `merge` does, which this is where there is no additional scan; `adapted` is used up.
    Raises `AttachError` where an edit cannot be merged, where the layers do not all have the same number of additional
    states, and for models that no larger state size gives the same function: those that normalise B and C over the states,
    or scale them by fixed numbers.
    """
    sites = [site for site in adapted.plan.sites if site.role == SCAN]
    if not sites:
        return merge(adapted)
    config, family = adapted.get_base_model().config, find_family(adapted.get_base_model().config.model_type)[1]
    if family.state_size is None:
        raise AttachError(
            f"cannot widen: a {config.model_type} model with more states normalises or scales its B and C, which additional "
            "states do not take part in, so it would compute something else. Use the adapter with ssmtune.load."
        )
    lasting = sorted({site.method for site in adapted.plan.unmergeable if site.role != SCAN})
    if lasting:
        raise AttachError(
            f"cannot widen: method {', '.join(lasting)} adds what no tensor holds, whatever its size. "
            "Use the adapter with ssmtune.load(base, directory)."
        )
    further: dict[str, Any] = {site.path.rpartition(".")[0]: adapted.edits[site.key] for site in sites}
    numbers = {edit.num_states for edit in further.values()}
    num_layers = sum(state.role == SCAN for state in take_inventory(weightless(config)).states)
    if len(numbers) > 1 or len(further) != num_layers:
        raise AttachError(
            f"cannot widen: {len(further)} of {num_layers} recurrent layers have additional states ({sorted(numbers)} of "
            "them), and a config has one state size for all layers. Use the adapter with ssmtune.load."
        )
    base = merge_tensors(adapted)
    return _wider(base, family.state_size, numbers.pop(), further)


def _wider(base: PreTrainedModel, state_size: str, num_states: int, further: Mapping[str, Any]) -> PreTrainedModel:
    """A model of `base`'s class and dtype with `num_states` more states, those of `further` by the name of their module."""
    config = deepcopy(base.config)
    setattr(config, state_size, getattr(config, state_size) + num_states)
    with torch.random.fork_rng():
        wide: PreTrainedModel = auto_class(config).from_config(config, dtype=base.dtype)
    wide.generation_config = deepcopy(base.generation_config)
    wide.to(base.device).train(base.training)
    inventory = take_inventory(base)
    segments: dict[str, list[Component]] = {}
    for segment in inventory.segments:
        segments.setdefault(segment.path, []).append(segment)
    with torch.no_grad():
        for component in inventory.components:
            values = base.get_parameter(component.path)
            target = wide.get_parameter(component.path)
            if target.shape != values.shape:
                edit = further[component.path.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]]
                values = _longer(component, values.float(), segments.get(component.path, []), edit)
            target.copy_(values.to(target.dtype))
    return wide


def _longer(component: Component, values: torch.Tensor, segments: list[Component], edit: Any) -> torch.Tensor:
    """The tensor with those of the additional states: behind the decays of each channel, or the rows of each group."""
    if component.role == "ssm.A_log":
        return torch.cat([values, torch.log(-edit.A(-torch.exp(values)))], dim=-1)
    rows, pieces = edit.rows(), []
    for segment in segments:
        assert segment.rows is not None
        ((first, end),) = segment.rows
        by_group = [values[first:end].view(edit.groups, -1, *values.shape[1:])]
        if segment.role in rows:
            by_group.append(rows[segment.role].view(edit.groups, -1, *values.shape[1:]))
        pieces.append(torch.cat(by_group, dim=1).flatten(0, 1))
    return torch.cat(pieces)
