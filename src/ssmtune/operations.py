"""Run a model on ssmtune's operations: documents kept apart when packed, padding that leaves states alone, no fused operation.

Installed per instance and removable; the weights are never touched.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssmtune.component import layer_of
from ssmtune.errors import AttachError
from ssmtune.families.base import Family
from ssmtune.ops.affix import run_affix
from ssmtune.ops.membrane import driven_gate
from ssmtune.ops.seam import STATES, Call, rebind, replace_methods, restore
from ssmtune.packing import documents_of, segment_index

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class InstalledOperations:
    """Handle on what was installed; `remove` restores the instance."""

    replaced: list[tuple[nn.Module, tuple[str, ...]]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    """What each recurrent module was last given, by the module's name in the model."""

    def remove(self) -> None:
        """Give every instance its class's methods back and remove the hooks."""
        for module, names in self.replaced:
            restore(module, names)
        for hook in self.hooks:
            hook.remove()
        self.replaced.clear()
        self.hooks.clear()


def install_operations(model: PreTrainedModel, family: Family) -> InstalledOperations:
    """Put ssmtune's operations under `model`, in place, and return the handle that removes them.

    Raises `AttachError` when they are installed already, or when transformers' forward no longer calls what we replace.
    """
    installed = InstalledOperations()
    names = {module: name for name, module in model.named_modules()}
    for module in recurrent_modules(model, family):
        call = installed.calls[names[module]] = Call(layer=layer_of(names[module]))
        operations = family.operations(module, call) if family.operations is not None else {}
        if operations:
            rebind(module, operations)
            installed.replaced.append((module, ("forward",)))
        if family.methods is not None:
            methods = family.methods(module, call)
            replace_methods(module, methods)
            installed.replaced.append((module, tuple(methods)))
        installed.hooks.append(module.register_forward_pre_hook(_note_call(call, family), with_kwargs=True))
        gated_norm = dict(module.named_children()).get(family.gated_norm)
        if gated_norm is not None:
            installed.hooks.append(gated_norm.register_forward_pre_hook(_drive_gate(call, module)))
    if family.prepare_packed is not None:
        backbone = model.get_submodule(family.backbone)
        hook = _separate_documents(family)
        installed.hooks.append(backbone.register_forward_pre_hook(hook, with_kwargs=True))
    return installed


def recurrent_modules(model: nn.Module, family: Family) -> list[nn.Module]:
    """Return the modules of `model` that carry a state from token to token, in model order."""
    return [module for module in model.modules() if type(module).__name__ in family.recurrent_classes]


def _drive_gate(call: Call, module: nn.Module) -> Any:
    layer: Any = module.layer_idx

    def hook(norm: nn.Module, args: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the norm the gate with what membranes add to it."""
        output, gate = args
        return output, driven_gate(call, layer, gate)

    return hook


def _note_call(call: Call, family: Family) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note documents, padding mask and cache for the operations: the layer's forward does not hand them on."""
        given = kwargs
        if len(args) > 1:
            given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
        # The module's own, also where it is a copy whose operations are shared with the original's.
        call.states = {name: child for name, child in module.named_children() if name in STATES}
        mask = given.get("attention_mask")
        documents = given.get("seq_idx")
        call.seq_idx = documents_of(mask) if documents is None else documents
        call.padding_mask = None if documents_of(mask) is not None else mask
        cache = given.get("cache_params", given.get("past_key_values"))
        # Weakly: the operations outlive the generation whose cache this is.
        call.cache = None if cache is None else weakref.proxy(cache)
        hidden = args[0] if args else kwargs.get("hidden_states")
        call.num_steps = 0 if hidden is None else hidden.shape[1]
        call.hidden_BTD = hidden if "additional_scan" in call.states else None
        call.start = None
        if call.edit("affix") is not None:
            assert family.entry_rows is not None and hidden is not None
            if not _continues(call):
                call.start = run_affix(module, call, family.entry_rows(module), hidden)

    return hook


def _continues(call: Call) -> bool:
    """Whether the cache holds a sequence already. Raises `AttachError` when all it holds of some row is padding."""
    if call.cache is None or call.cache.get_conv_state(call.layer) is None:
        return False
    mask = call.padding_mask
    num_seen = 0 if mask is None else mask.shape[-1] - call.num_steps
    if mask is not None and num_seen > 0 and not bool((mask[:, :num_seen].any(dim=1) | (mask[:, num_seen] != 0)).all()):
        raise AttachError(
            f"affix: a row's padding on the left goes on past the first {num_seen} steps, which the cache holds already, "
            "so that its text would begin beside padding and not beside the affix. Prefill the padding in one piece."
        )
    return True


def _separate_documents(family: Family) -> Any:
    def hook(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Turn `position_ids` that restart inside a row into what keeps its documents apart."""
        cache = kwargs.get(family.cache)
        if kwargs.get("position_ids") is None and cache is not None and not family.counts_on:
            return args, {**kwargs, "position_ids": _count_on(cache, kwargs)}
        position_ids = restarting_positions(kwargs, family.cache)
        if position_ids is None:
            return args, kwargs
        assert family.prepare_packed is not None
        seq_idx = segment_index(position_ids)
        return args, {**kwargs, **family.prepare_packed(backbone, position_ids, seq_idx)}

    return hook


def restarting_positions(inputs: dict[str, Any], cache: str) -> torch.Tensor | None:
    """Return the position ids [B, T] of a backbone's call that say where documents start; None for one document a row."""
    position_ids, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if position_ids is not None and position_ids.dim() == 3:
        # Vision models stack positions of text, time, height and width; without the first a row is one document.
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None
    if position_ids is None or inputs.get(cache) is not None or position_ids.shape[-1] == 1:
        return None
    # A ready-made mask is the caller's own; a padding mask with padding in it means rows of one document each.
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2 or not bool(mask.bool().all())):
        return None
    positions: torch.Tensor = position_ids
    return positions


def _count_on(cache: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Position ids [1, T] of the tokens after those in the cache."""
    import torch

    tokens = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    first = cache.get_seq_length()
    return torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
