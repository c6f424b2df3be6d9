"""Run a model on ssmtune's operations: documents kept apart when packed, padding that leaves states alone, no fused operation.

Installed per instance and removable; the weights are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssmtune.families.base import Family
from ssmtune.ops.seam import rebind, restore
from ssmtune.packing import segment_index

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class InstalledOperations:
    """Handle on what was installed; `remove` restores the instance."""

    modules: list[nn.Module] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def remove(self) -> None:
        """Give every instance its class's forward back and remove the hooks."""
        for module in self.modules:
            restore(module)
        for hook in self.hooks:
            hook.remove()
        self.modules.clear()
        self.hooks.clear()


def install_operations(model: PreTrainedModel, family: Family) -> InstalledOperations:
    """Put ssmtune's operations under `model`, in place, and return the handle that removes them.

    Raises `AttachError` when they are installed already, or when transformers' forward no longer calls what we replace.
    """
    installed = InstalledOperations()
    if family.recurrent_module is not None and family.operations is not None:
        for index in range(model.config.num_hidden_layers):
            module = _submodule(model, family.recurrent_module.format(layer=index))
            if module is None:
                continue
            rebind(module, family.operations(module))
            installed.modules.append(module)
            installed.hooks.append(module.register_forward_pre_hook(_forward_padding, with_kwargs=True))
    if family.prepare_packed is not None:
        backbone = model.get_submodule(family.backbone)
        hook = _separate_documents(family)
        installed.hooks.append(backbone.register_forward_pre_hook(hook, with_kwargs=True))
    return installed


def _submodule(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The submodule of that name, or None where this layer has none (a hybrid's attention layers)."""
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child, None)


def _forward_padding(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand the padding mask on to the operations, which the layer's forward does not do."""
    return args, {**kwargs, "padding_mask": kwargs.get("attention_mask")}


def _separate_documents(family: Family) -> Any:
    def hook(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Turn `position_ids` that restart inside a row into what keeps its documents apart."""
        position_ids = kwargs.get("position_ids")
        mask = kwargs.get("attention_mask")
        if position_ids is None or kwargs.get("past_key_values") is not None or position_ids.shape[-1] == 1:
            return args, kwargs
        # A ready-made mask is the caller's own; a padding mask with padding in it means rows of one document each.
        if mask is not None and (isinstance(mask, dict) or mask.dim() != 2 or not bool(mask.bool().all())):
            return args, kwargs
        assert family.prepare_packed is not None
        seq_idx = segment_index(position_ids)
        return args, {**kwargs, **family.prepare_packed(backbone, position_ids, seq_idx)}

    return hook
