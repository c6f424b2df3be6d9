"""Put rewritten layers under one model instance, and say for each layer that keeps its own forward why.

A rewritten layer runs whole sequences without a cache and without padding; any other call takes the layer's own forward.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ssmtune.discovery import load_constant, module_names
from ssmtune.fast._linear import (
    ATTRIBUTE,
    Factors,
    factors_of,
    is_cast,
    is_plain,
    module_forward,
    project,
    round_factors,
)
from ssmtune.fast._norm import norm_forward, norm_shift
from ssmtune.packing import documents_of

if TYPE_CHECKING:
    from ssmtune.families.base import Family
    from ssmtune.plan import Plan, Site

__all__ = ["Block", "FastLayers", "Inside", "install_fast", "project"]

CORE_TENSORS = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class Inside:
    """What a layer's call was given beside its hidden states, for the modules inside it."""

    given: Mapping[str, Any]
    seq_idx: torch.Tensor | None
    """[B, T] document of each step, None for one per row."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A family's rewritten layer.

    `refusal(layer)` says why a layer cannot be served, or None; `run(layer, hidden [B, T, D], inside)` returns what the
    layer's own forward returns.
    """

    layer_class: str
    refusal: Callable[[Any], str | None]
    run: Callable[[Any, torch.Tensor, Inside], Any]


@dataclass
class FastLayers:
    """What was put under a model; `remove` restores it."""

    modules: list[nn.Module] = field(default_factory=list)
    num_layers: int = 0
    num_blocks: int = 0
    num_norms: int = 0
    factors: list[Factors] = field(default_factory=list)
    replay: Callable[..., Any] | None = None
    """(backbone, its forward, args, kwargs) -> output: what replays whole passes, where a trainer asked for it (`graphs`)."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Name of a layer -> why it keeps its own forward."""

    def remove(self) -> None:
        """Give every instance its class's forward back."""
        for module in self.modules:
            vars(module).pop("forward", None)
            vars(module).pop(ATTRIBUTE, None)
        self.modules.clear()
        self.replay = None

    def describe(self) -> str:
        """Return one line: how many layers are rewritten, and why others are not."""
        kept = Counter(self.reasons.values())
        own = "; ".join(f"{number} of them not: {reason}" for reason, number in kept.items())
        rest = f"{self.num_norms} norms and {len(self.factors)} adapted projections on ssmtune's operations"
        return f"{self.num_blocks} of {self.num_layers} layers rewritten{f' ({own})' if own else ''}; {rest}"


def install_fast(model: nn.Module, name: str, family: Family, plan: Plan) -> FastLayers:
    """Put the rewritten layers of the family of that name, and ssmtune's norm and projection elsewhere, under `model`.

    In place; weights and classes are not touched.
    """
    layers = _decoder_layers(model, family)
    installed = FastLayers(num_layers=len(layers))
    block = load_constant("ssmtune.fast", name, "BLOCK", Block) if name in module_names("ssmtune.fast") else None
    for path, layer in layers:
        sites = [site for site in plan.sites if site.path.startswith(f"{path}.")]
        reason = f"family {name!r} has no rewritten layer" if block is None else _refusal(block, layer, sites)
        if reason is not None:
            installed.reasons[path] = reason
            continue
        assert block is not None
        layer.forward = _layer_forward(layer, block)
        installed.modules.append(layer)
        installed.num_blocks += 1
    for module in model.modules():
        factors = factors_of(module)
        if factors is not None:
            vars(module)[ATTRIBUTE] = factors
            module.forward = module_forward(factors)
            installed.factors.append(factors)
        else:
            shift = norm_shift(module)
            if shift is None:
                continue
            module.forward = norm_forward(module, shift)
            installed.num_norms += 1
        installed.modules.append(module)
    # Not `family.backbone`, which is the whole model where only that is given positions.
    backbone: Any = model.base_model
    backbone.forward = _backbone_forward(backbone, installed)
    installed.modules.append(backbone)
    return installed


def _backbone_forward(backbone: Any, installed: FastLayers) -> Callable[..., Any]:
    own: Callable[..., Any] = backbone.forward

    def compute(*args: Any, **kwargs: Any) -> Any:
        round_factors(installed.factors)
        return own(*args, **kwargs)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if installed.replay is None:
            return compute(*args, **kwargs)
        return installed.replay(backbone, compute, args, kwargs)

    return forward


def _decoder_layers(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The numbered layers that the family's claims speak of, by name."""
    stems = dict.fromkeys(claim.path.partition("{layer}")[0] for claim in family.claims if "{layer}" in claim.path)
    modules = dict(model.named_modules())
    return [
        (f"{stem}{number}", layer)
        for stem in stems
        if stem.rstrip(".") in modules
        for number, layer in modules[stem.rstrip(".")].named_children()
    ]


def _refusal(block: Block, layer: nn.Module, sites: Sequence[Site]) -> str | None:
    """Why a layer keeps its own forward, or None."""
    if type(layer).__name__ != block.layer_class:
        return f"it is a {type(layer).__name__}, not a {block.layer_class}"
    for site in sites:
        is_core = site.container == "tensor" and site.path.rpartition(".")[2] in CORE_TENSORS
        if not is_core and site.container != "module":
            return f"method {site.method!r} on {site.role}"
    for name, module in layer.named_modules():
        if isinstance(module, LoraLayer) and factors_of(module) is None:
            return f"{name} carries something else than one plain LoRA"
        if isinstance(module, nn.Linear) and not is_plain(module):
            return f"{name} is a {type(module).__name__}"
    return block.refusal(layer)


def _layer_forward(layer: Any, block: Block) -> Callable[..., Any]:
    own: Callable[..., Any] = types.MethodType(type(layer).forward, layer)
    takes = list(inspect.signature(type(layer).forward).parameters)[1:]
    # Not the hidden states: a residual stream may be fp32 between layers in bf16.
    linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))

    def compute(hidden: torch.Tensor, inside: Inside) -> Any:
        # Everything inside is in the model's dtype already; each operation would switch autocast off by itself.
        with torch.autocast(hidden.device.type, enabled=False):
            return block.run(layer, hidden, inside)

    def forward(*args: Any, **kwargs: Any) -> Any:
        """The rewritten layer for whole sequences; the layer's own forward beside a cache or padding."""
        given = {**dict(zip(takes, args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        if given.get("past_key_values") is not None or given.get("cache_params") is not None or is_cast(linear):
            return own(*args, **kwargs)
        seq_idx = given.get("seq_idx")
        for mask in (value for name, value in given.items() if name.endswith("attention_mask")):
            documents = documents_of(mask)
            seq_idx = documents if seq_idx is None else seq_idx
            if mask is not None and documents is None and mask.dim() == 2:
                return own(*args, **kwargs)
        inside = Inside(given, seq_idx)
        if layer.gradient_checkpointing and layer.training:
            # transformers recomputes inside the class's forward, which this one stands in for.
            return layer._gradient_checkpointing_func(partial(compute, inside=inside), hidden)
        return compute(hidden, inside)

    return forward
