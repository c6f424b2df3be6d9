"""Put a plan's edits of single tensors, added states and branches on a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ssmtune.base_tensors import base_tensor, names_by_tensor, owner_of
from ssmtune.branches import BranchHooks
from ssmtune.config import decode
from ssmtune.methods.base import TensorEdit, get_method
from ssmtune.plan import Plan, Site
from ssmtune.quantized import dense, is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_edits(model: PreTrainedModel, plan: Plan, edits: dict[str, TensorEdit]) -> None:
    """Put the plan's tensor edits on `model` and into `edits`, one by one, so that a failure can be undone."""
    names = names_by_tensor(model)
    for site in plan.sites:
        if site.container != "tensor":
            continue
        method = get_method(site.method)
        assert method.make_edit is not None
        weight = base_tensor(model, site.path)
        options = decode(method.Options, site.options, where=f"plan, {site.path}")
        edit = method.make_edit(dense(weight), site.rows, options).to(weight.device)
        edits[site.key] = cast(TensorEdit, edit)
        for path in names[id(base_tensor(model, site.path))]:
            owner, name = owner_of(model, path)
            if is_quantized(weight) and not parametrize.is_parametrized(owner, name):
                from ssmtune.four_bit import Dequantized

                parametrize.register_parametrization(owner, name, Dequantized(), unsafe=True)
            # unsafe: the effective tensor may be fp32 where the base is bf16, which is the point.
            parametrize.register_parametrization(owner, name, edit, unsafe=True)


def apply_additions(
    model: PreTrainedModel, plan: Plan, edits: dict[str, TensorEdit], branches: BranchHooks | None
) -> None:
    """Put states into their recurrences, where the operations find them, and branches into their blocks, which hooks run."""
    for site in plan.sites:
        if not site.is_added:
            continue
        method = get_method(site.method)
        make = method.make_state if site.container == "state" else method.make_branch
        assert make is not None
        parent, _, name = site.path.rpartition(".")
        module = model.get_submodule(parent)
        options = decode(method.Options, site.options, where=f"plan, {site.path}")
        edit = make(site.shape, options).to(next(module.parameters(), next(model.parameters())).device)
        module.add_module(name, edit)
        edits[site.key] = cast(TensorEdit, edit)
        if site.container == "branch":
            assert branches is not None
            branches.add(parent, module, edit)


def site_tensor(model: nn.Module, site: Site) -> torch.Tensor:
    """Return the rows of the untouched base tensor that a site edits."""
    tensor = dense(base_tensor(model, site.path)).detach()
    return tensor if site.rows is None else torch.cat([tensor[first:end] for first, end in site.rows])
