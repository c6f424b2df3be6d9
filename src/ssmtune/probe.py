"""Probe: how each parameter is used on each execution path, measured by running a weightless copy of the model.

CALL: the module that owns the tensor is called, so an adapter module around it acts.
READ: another module reads the tensor itself, so only an edit of the tensor acts.
NONE: the path never uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.component import LAYER_NUMBER
from ssmtune.errors import UnsupportedModel
from ssmtune.families.base import Family, find_family
from ssmtune.models import weightless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Use = Literal["CALL", "READ", "NONE"]

PATHS = ("train", "eval", "prefill", "decode")
"""Training (no cache), evaluation (no cache), first pass with a cache, one token with a cache."""

NUM_TOKENS = 3


@dataclass(frozen=True)
class Uses:
    """For each path, the use of each parameter, and CALL for each module that was called, by its name in the model."""

    by_path: dict[str, dict[str, Use]]

    def of(self, parameter: str) -> dict[str, Use]:
        """Return {path: use} of one parameter or module."""
        return {path: uses.get(parameter, "NONE") for path, uses in self.by_path.items()}


def probe(model: PreTrainedModel) -> Uses:
    """Return how every parameter is used on every path under ssmtune's operations; `model` itself is not run or changed.

    A copy without weights (meta device) is built from the model's config, with one layer of each kind, and run on a few
    tokens; layers that hold the same tensors are used alike.
    """
    family = find_family(model.config.model_type)[1]
    config, kinds = _one_layer_of_each_kind(model, family.backbone)
    measured = _measure(config, family)
    names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
    return Uses(
        {
            path: {name: uses.get(_rename(name, family.backbone, kinds), "NONE") for name in names}
            for path, uses in measured.items()
        }
    )


def _one_layer_of_each_kind(model: PreTrainedModel, backbone: str) -> tuple[Any, dict[int, int]]:
    """A config of one layer per kind, and for each layer of `model` the layer that stands for it there."""
    kinds = _layer_kinds(model, backbone)
    first = {kind: layer for layer, kind in sorted(kinds.items(), reverse=True)}
    picked = sorted(first.values())
    config = _keep_layers(model.config, picked)
    found = _layer_kinds(_weightless(config), backbone)
    if [found.get(i) for i in range(len(picked))] != [kinds[layer] for layer in picked]:
        # The architecture decides a layer's kind by something else than layer_types: measure all of them.
        return deepcopy(model.config), {layer: layer for layer in kinds}
    return config, {layer: picked.index(first[kind]) for layer, kind in kinds.items()}


def _keep_layers(config: Any, picked: list[int]) -> Any:
    """The config with the layers `picked` alone, made anew, so that it derives again what it derives from its layers."""
    if config.get_text_config() is not config:
        return dataclasses.replace(config, text_config=_keep_layers(config.get_text_config(), picked))
    fields = {field.name for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {"num_hidden_layers": len(picked)} if "num_hidden_layers" in fields else {}
    for name in ("layer_types", "mlp_layer_types"):
        field = config.attribute_map.get(name, name)
        if field in fields and getattr(config, field) is not None:
            changes[field] = [getattr(config, field)[layer] for layer in picked]
    return dataclasses.replace(config, **changes)


def _layer_kinds(model: Any, backbone: str) -> dict[int, frozenset[str]]:
    """For each layer of the backbone, the names of its parameters without the layer's number."""
    kinds: dict[int, set[str]] = {}
    for name, _ in model.named_parameters():
        match = LAYER_NUMBER.search(name)
        if match and name.startswith(backbone):
            kinds.setdefault(int(match.group(1)), set()).add(LAYER_NUMBER.sub(".#.", name, count=1))
    return {layer: frozenset(names) for layer, names in kinds.items()}


def _rename(name: str, backbone: str, kinds: dict[int, int]) -> str:
    if not name.startswith(backbone):
        return name
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

    has_attention = any(claim.group == "attention" for claim in family.claims)
    copy = _weightless(config)
    install_operations(copy, family)
    measured: dict[str, dict[str, Use]] = {}
    cache = None
    with torch.no_grad():
        for path in PATHS:
            copy.train(path == "train")
            num_new, num_seen = (1, NUM_TOKENS) if path == "decode" else (NUM_TOKENS, 0)
            inputs: dict[str, Any] = {family.cache: cache} if path == "decode" else {}
            if has_attention:
                # A ready mask, since building one looks at values, which the copy does not have; the same for all keys,
                # since a sliding window keeps fewer of them.
                inputs["attention_mask"] = torch.ones((1, 1, num_new, 1), dtype=torch.bool, device="meta")
                inputs["position_ids"] = torch.arange(num_seen, num_seen + num_new, device="meta")[None]
            with _recording(copy) as uses:
                try:
                    output = copy(
                        input_ids=torch.zeros(1, num_new, dtype=torch.long, device="meta"),
                        use_cache=path in ("prefill", "decode"),
                        **inputs,
                    )
                except ValueError as error:
                    raise UnsupportedModel(
                        f"{config.model_type}: transformers cannot run a model of this config on path {path} ({error}). "
                        "A hybrid without any attention layer has no cache there; use a config that has one."
                    ) from None
            cache = output[family.cache] if path == "prefill" else None
            measured[path] = uses
    return measured


@contextmanager
def _recording(model: Any) -> Iterator[dict[str, Use]]:
    """Record, while the block runs, which parameters reach a torch function, and whether inside their owner's own call."""
    from torch.overrides import TorchFunctionMode

    owners: dict[int, list[Any]] = {}
    names: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A leaf can be wrapped or replaced by an adapter module; a layer that reads its own tensors cannot.
            is_leaf = not any(True for _ in module.children())
            if is_leaf and hasattr(module, "weight"):
                owners.setdefault(id(parameter), []).append(module)
            names.setdefault(id(parameter), f"{module_name}.{name}")
    uses: dict[str, Use] = {}
    active: list[Any] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for argument in (*args, *(kwargs or {}).values()):
                key = id(argument)
                if key in names:
                    called = any(module is owner for module in active for owner in owners.get(key, ()))
                    if called or names[key] not in uses:
                        uses[names[key]] = "CALL" if called else "READ"
            return func(*args, **(kwargs or {}))

    module_names = {module: name for name, module in model.named_modules()}

    def enter(module: Any, _: Any) -> None:
        active.append(module)
        uses[module_names[module]] = "CALL"

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
