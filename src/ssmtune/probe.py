"""Probe: how each parameter is used on each execution path, measured by running a weightless copy of the model.

CALL: the module that owns the tensor is called, so an adapter module around it acts.
READ: another module reads the tensor itself, so only an edit of the tensor acts.
NONE: the path never uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.families.base import Family, find_family
from ssmtune.models import weightless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Use = Literal["CALL", "READ", "NONE"]

PATHS = ("train", "eval", "prefill", "decode")
"""Training (no cache), evaluation (no cache), first pass with a cache, one token with a cache."""

NUM_TOKENS = 3

LAYER_NUMBER = re.compile(r"\.(\d+)\.")
"""The first number in a parameter's name is its layer's."""


@dataclass(frozen=True)
class Uses:
    """For each path, the use of each parameter by its name in the model."""

    by_path: dict[str, dict[str, Use]]

    def of(self, parameter: str) -> dict[str, Use]:
        """Return {path: use} of one parameter."""
        return {path: uses.get(parameter, "NONE") for path, uses in self.by_path.items()}


def probe(model: PreTrainedModel) -> Uses:
    """Return how every parameter is used on every path under ssmtune's operations; `model` itself is not run or changed.

    A copy without weights (meta device) is built from the model's config, with one layer of each kind, and run on a few
    tokens; layers that hold the same tensors are used alike.
    """
    config, kinds = _one_layer_of_each_kind(model)
    measured = _measure(config, find_family(config.model_type)[1])
    return Uses(
        {
            path: {name: uses.get(_rename(name, kinds), "NONE") for name, _ in model.named_parameters()}
            for path, uses in measured.items()
        }
    )


def _one_layer_of_each_kind(model: PreTrainedModel) -> tuple[Any, dict[int, int]]:
    """A config of one layer per kind, and for each layer of `model` the layer that stands for it there."""
    kinds = _layer_kinds(model)
    first = {kind: layer for layer, kind in sorted(kinds.items(), reverse=True)}
    picked = sorted(first.values())
    config = deepcopy(model.config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in picked]
    config.num_hidden_layers = len(picked)
    if [_layer_kinds(_weightless(config)).get(i) for i in range(len(picked))] != [kinds[layer] for layer in picked]:
        # The architecture decides a layer's kind by something else than layer_types: measure all of them.
        return deepcopy(model.config), {layer: layer for layer in kinds}
    return config, {layer: picked.index(first[kind]) for layer, kind in kinds.items()}


def _layer_kinds(model: Any) -> dict[int, frozenset[str]]:
    """For each layer, the names of its parameters without the layer's number."""
    kinds: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        match = LAYER_NUMBER.search(name)
        if match:
            kinds.setdefault(int(match.group(1)), set()).add(LAYER_NUMBER.sub(".#.", name, count=1))
    return {layer: frozenset(names) for layer, names in kinds.items()}


def _rename(name: str, kinds: dict[int, int]) -> str:
    return LAYER_NUMBER.sub(lambda match: f".{kinds[int(match.group(1))]}.", name, count=1)


def _weightless(config: Any) -> Any:
    config = deepcopy(config)
    # Experts by gathered products: the grouped product has no weightless form for every shape. Both read the same tensors.
    config._experts_implementation = "batched_mm"
    return weightless(config)


def _measure(config: Any, family: Family) -> dict[str, dict[str, Use]]:
    import torch

    # Imported here, so that planning from a config alone does not load torch before it must.
    from ssmtune.operations import install_operations

    copy = _weightless(config)
    install_operations(copy, family)
    measured: dict[str, dict[str, Use]] = {}
    cache = None
    with torch.no_grad():
        for path in PATHS:
            copy.train(path == "train")
            num_new, num_seen = (1, NUM_TOKENS) if path == "decode" else (NUM_TOKENS, 0)
            positions = torch.arange(num_seen, num_seen + num_new, device="meta")[None]
            with _recording(copy) as uses:
                output = copy(
                    input_ids=torch.zeros(1, num_new, dtype=torch.long, device="meta"),
                    position_ids=positions,
                    # A ready mask, since building one looks at values, which the copy does not have.
                    attention_mask=torch.ones(1, 1, num_new, num_seen + num_new, dtype=torch.bool, device="meta"),
                    past_key_values=cache if path == "decode" else None,
                    use_cache=path in ("prefill", "decode"),
                )
            cache = output.past_key_values
            measured[path] = uses
    return measured


@contextmanager
def _recording(model: Any) -> Iterator[dict[str, Use]]:
    """Record, while the block runs, which parameters reach a torch function, and whether inside their owner's own call."""
    from torch.overrides import TorchFunctionMode

    owners = {}
    names: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A leaf can be wrapped or replaced by an adapter module; a layer that reads its own tensors cannot.
            is_leaf = not any(True for _ in module.children())
            owners[id(parameter)] = module if is_leaf and hasattr(module, "weight") else None
            names.setdefault(id(parameter), f"{module_name}.{name}")
    uses: dict[str, Use] = {}
    active: list[Any] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for argument in (*args, *(kwargs or {}).values()):
                key = id(argument)
                if key in names:
                    called = owners[key] is not None and any(module is owners[key] for module in active)
                    if called or names[key] not in uses:
                        uses[names[key]] = "CALL" if called else "READ"
            return func(*args, **(kwargs or {}))

    def enter(module: Any, _: Any) -> None:
        active.append(module)

    def leave(module: Any, _: Any, __: Any) -> None:
        active.pop()

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with Recorder():
            yield uses
    finally:
        for handle in handles:
            handle.remove()
