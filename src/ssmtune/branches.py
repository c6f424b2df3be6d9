"""Run branches beside the blocks of a model: with the documents, padding and states of generation that the call implies.

An MLP is given its input and nothing else, so what a branch must know is noted where the model's backbone is called.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ssmtune.errors import AttachError
from ssmtune.operations import restarting_positions
from ssmtune.packing import documents_of, segment_index

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from ssmtune.families.base import Family

StateKey = tuple[str, int]
"""Name of the block, and which of its calls in one pass: a block that several layers share has a state in each."""

STATES = "_ssmtune_branch_states"
"""Attribute under which a cache holds the states of the branches, so that they live, and are copied, with it."""


@dataclass
class KeptStates:
    """The states [B, n] after the last token that a cache has seen, None for a branch without memory, and how many tokens
    that were."""

    states: dict[StateKey, torch.Tensor | None]
    num_seen: int


@dataclass
class Pass:
    """One pass through the backbone."""

    seq_idx: torch.Tensor | None
    padding_mask: torch.Tensor | None
    kept: KeptStates | None
    """What the pass continues, where its cache says so."""
    num_seen: int
    """Tokens in the cache; 0 for a new sequence."""
    num_calls: Counter[str] = field(default_factory=Counter)
    leaving: dict[StateKey, torch.Tensor | None] = field(default_factory=dict)

    def entering(self, key: StateKey) -> torch.Tensor | None:
        """Return the state that a branch continues from, None for zero. Raises `AttachError` where the cache lacks it."""
        if self.num_seen == 0:
            return None
        if self.kept is None or self.kept.num_seen != self.num_seen or key not in self.kept.states:
            seen = 0 if self.kept is None else self.kept.num_seen
            raise AttachError(
                f"the cache holds {self.num_seen} tokens, of which the branch beside {key[0]} has seen {seen}: it was filled "
                "without this adapter, or cut. Fill it again with the adapter on, from the first token."
            )
        return self.kept.states[key]


class BranchHooks:
    """The hooks that run a model's branches; `remove` takes them off and leaves no trace."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.current: Pass | None = None
        self.cache_name = family.cache
        self.recomputing: dict[nn.Module, Callable[..., Any]] = {}
        backbone = model.get_submodule(family.backbone)
        self.backbone = backbone
        self.handles = [
            # First: what keeps documents apart in attention and scans replaces the mask and the positions.
            backbone.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def add(self, path: str, block: nn.Module, branch: nn.Module) -> None:
        """Let `branch`, a child of the module `block` at `path`, add to what the block returns."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not branch.enabled:
                return None
            hidden = args[0] if args else _first_argument(module, kwargs)
            added = self._run(path, branch, hidden)
            if isinstance(output, tuple):
                return (_sum(output[0], added), *output[1:])
            return _sum(output, added)

        self.handles.append(block.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for layer, function in self.recomputing.items():
            vars(layer)["_gradient_checkpointing_func"] = function
        self.recomputing.clear()

    def _run(self, path: str, branch: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        noted = self.current
        if noted is None:
            raise AttachError(
                f"the block {path} was called outside its model's own call, so the branch beside it does not know which "
                "documents and padding its input holds. Call the model, and let transformers recompute its layers "
                "(model.activation_checkpointing_enable()), not a checkpoint of your own."
            )
        key = (path, noted.num_calls[path])
        noted.num_calls[path] += 1
        added: torch.Tensor
        added, final = branch(hidden, noted.seq_idx, noted.padding_mask, noted.entering(key))
        noted.leaving[key] = None if final is None else final.detach()
        return added

    def _begin(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        num_new = tokens.shape[1]
        mask, documents = kwargs.get("attention_mask"), kwargs.get("seq_idx")
        if documents is None:
            documents = documents_of(mask) if mask is not None and not isinstance(mask, dict) else None
        positions = restarting_positions(kwargs, self.cache_name)
        if documents is None and positions is not None:
            documents = segment_index(positions)
        if documents is not None and bool((documents == documents[:, :1]).all()):
            documents = None
        padding = None
        if documents is None and mask is not None and not isinstance(mask, dict) and mask.dim() == 2:
            padding = mask[:, -num_new:]
            # All ones, as generation hands it on: nothing to look at again in every block.
            padding = None if bool(padding.all()) else padding
        cache = kwargs.get(self.cache_name)
        kept = None if cache is None else vars(cache).get(STATES)
        self.current = Pass(documents, padding, kept, 0 if cache is None else int(cache.get_seq_length()))
        if backbone.training:
            self._carry_into_recomputation()

    def _end(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        noted, self.current = self.current, None
        # No mapping where the pass failed, or where a bare tuple was asked for, which names no cache.
        cache = output.get(self.cache_name) if isinstance(output, Mapping) else None
        if noted is None or cache is None or not noted.leaving:
            return
        setattr(cache, STATES, KeptStates(noted.leaving, int(cache.get_seq_length())))
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
            setattr(cache, name, _WithStates(cache, name))
        # A pass is remembered for as long as it may be recomputed; its states live in the cache.
        noted.leaving = {}

    def _carry_into_recomputation(self) -> None:
        """Let a layer that is recomputed in the backward pass see the pass that it was first computed in."""
        for layer in self.backbone.modules():
            function = vars(layer).get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _Carried):
                self.recomputing[layer] = function
                vars(layer)["_gradient_checkpointing_func"] = _Carried(self, function)


class _Carried:
    """A checkpointing function under which what is recomputed belongs to the pass that it was first computed in."""

    def __init__(self, hooks: BranchHooks, checkpoint: Callable[..., Any]) -> None:
        self.hooks, self.checkpoint = hooks, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        noted = self.hooks.current

        def run(*inputs: Any, **more: Any) -> Any:
            outer, self.hooks.current = self.hooks.current, noted
            try:
                return function(*inputs, **more)
            finally:
                self.hooks.current = outer

        return self.checkpoint(run, *args, **kwargs)


class _WithStates:
    """A cache's own method that permutes its rows, with the rows of the branches' states permuted alike."""

    def __init__(self, cache: Any, name: str) -> None:
        # Weakly: it lies in the cache itself, which must go when the generation is over.
        self.cache, self.name = weakref.ref(cache), name

    def __call__(self, argument: Any) -> None:
        cache: Any = self.cache()
        getattr(type(cache), self.name)(cache, argument)
        kept: KeptStates = vars(cache)[STATES]
        for key, state in kept.states.items():
            if state is None:
                continue
            if self.name == "batch_repeat_interleave":
                kept.states[key] = state.repeat_interleave(argument, dim=0)
            else:
                kept.states[key] = state[argument.to(state.device)]

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithStates:
        """In a copied cache it is the copy's."""
        return _WithStates(memo[id(self.cache())], self.name)


def _sum(output: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    return (output.float() + added).to(output.dtype)


def _first_argument(module: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """A block's input where it is handed over by name."""
    name = list(inspect.signature(type(module).forward).parameters)[1]
    value: torch.Tensor = kwargs[name]
    return value
