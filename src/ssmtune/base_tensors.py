"""The tensors of a base model by their own names, under whatever edits and layers are on it."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize


def owner_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """Return (module, attribute) that hold the tensor named `path`, looking through the layers that PEFT put around it."""
    parent, _, name = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    while isinstance(owner, BaseTunerLayer):
        owner = owner.base_layer
    return owner, name


def base_name(name: str) -> str:
    """Return the name that a parameter has in the base model, under whatever edits and layers are on it."""
    owner, edited, rest = name.partition(".parametrizations.")
    if edited:
        name = f"{owner}.{rest.removesuffix('.original')}"
    return name.replace(".base_layer", "")


def names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """Return for the id of each parameter every name that it has in the base model; a shared one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(base_name(name))
    return names


def base_tensor(model: nn.Module, path: str) -> nn.Parameter:
    """Return the untouched base tensor named `path`, under whatever edits or layers are on it."""
    owner, name = owner_of(model, path)
    if parametrize.is_parametrized(owner, name):
        original: nn.Parameter = owner.parametrizations[name].original
        return original
    tensor: nn.Parameter = getattr(owner, name)
    return tensor
