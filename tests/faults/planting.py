"""Small adapted models with a few steps of training, and ways to plant faults in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ssmtune.attach import AdaptedModel
from ssmtune.component import layer_of
from ssmtune.families.base import find_family, get_family
from ssmtune.ops.seam import Call, rebind, restore
from ssmtune.verify.base import CheckResult

Make = Callable[..., AdaptedModel]
Run = Callable[..., CheckResult]


def make_base(config: str = "dense", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Granite hybrid with random weights; `dense` is tied, `odd` has biases, groups and a limit on dt."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(get_family("granite_hybrid").tiny_configs()[config]).to(dtype)


def replace_operation(adapted: AdaptedModel, layer: int, **functions: Callable[..., Any]) -> None:
    """Put other functions under one recurrent layer of an adapted model, and ssmtune's for the rest."""
    model = adapted.base_model.model
    family = find_family(model.config.model_type)[1]
    # Edits of a module's own tensors give it a class of its own, named after its class.
    modules = {
        layer_of(name): m
        for name, m in model.named_modules()
        if type(m).__name__.removeprefix("Parametrized") in family.recurrent_classes
    }
    module = modules[layer]
    assert family.operations is not None
    operations = dict(family.operations(module, Call()))
    assert functions.keys() <= operations.keys(), "the layer calls no such function"
    restore(module)
    rebind(module, {**operations, **functions})
