"""Put rewritten layers under one model instance, and say for each layer that keeps its own forward why.

A rewritten layer runs whole sequences without a cache and without padding; any other call takes the layer's own forward.
"""

from __future__ import annotations

import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from ssmtune.discovery import load_constant, module_names
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.projection import LowRank, projection
from ssmtune.ops.projection.spec import Prologue
from ssmtune.packing import documents_of

if TYPE_CHECKING:
    from ssmtune.families.base import Family
    from ssmtune.plan import Plan, Site

CORE_TENSORS = ("A_log", "D", "dt_bias")

NORM_TOLERANCE = 1e-4
"""Relative: a norm in fp32 that rounds in another order differs by a few units in the last place; one that adds 1 to
its weight, or subtracts a mean, by tenths."""


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
    num_projections: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """Name of a layer -> why it keeps its own forward."""

    def remove(self) -> None:
        """Give every instance its class's forward back."""
        for module in self.modules:
            vars(module).pop("forward", None)
        self.modules.clear()

    def describe(self) -> str:
        """Return one line: how many layers are rewritten, and why others are not."""
        kept = Counter(self.reasons.values())
        own = "; ".join(f"{number} of them not: {reason}" for reason, number in kept.items())
        rest = f"{self.num_norms} norms and {self.num_projections} adapted projections on ssmtune's operations"
        return f"{self.num_blocks} of {self.num_layers} layers rewritten{f' ({own})' if own else ''}; {rest}"


def install_fast(model: nn.Module, name: str, family: Family, plan: Plan) -> FastLayers:
    """Put the rewritten layers of the family of that name, and ssmtune's norm and projection elsewhere, under `model`.

    In place; weights and classes are not touched.
    """
    layers = _decoder_layers(model, family)
    installed = FastLayers(num_layers=len(layers))
    block = load_constant("ssmtune.fast", name, "BLOCK", Block) if name in module_names("ssmtune.fast") else None
    by_layer: dict[str, list[Site]] = {name: [] for name, _ in layers}
    for site in plan.sites:
        for name in by_layer:
            if site.path.startswith(f"{name}."):
                by_layer[name].append(site)
    for name, layer in layers:
        reason = (
            f"family {family!r} has no rewritten layer" if block is None else _refusal(block, layer, by_layer[name])
        )
        if reason is not None:
            installed.reasons[name] = reason
            continue
        assert block is not None
        layer.forward = _layer_forward(layer, block)
        installed.modules.append(layer)
        installed.num_blocks += 1
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.forward = _projection_forward(module)
            installed.modules.append(module)
            installed.num_projections += 1
        elif _is_rms_norm(module):
            module.forward = _norm_forward(module)
            installed.modules.append(module)
            installed.num_norms += 1
    return installed


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
        name = site.path.rpartition(".")[2]
        if site.container == "module" and site.method == "lora":
            continue
        if site.container == "tensor" and name in CORE_TENSORS:
            continue
        return f"method {site.method!r} on {site.role}"
    for name, module in layer.named_modules():
        if isinstance(module, LoraLinear) and not _is_plain(module):
            return f"{name} is adapted by more than one plain LoRA"
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    return block.refusal(layer)


def _is_plain(module: LoraLinear) -> bool:
    """Whether a PEFT layer is one LoRA over a frozen linear, and nothing else."""
    return (
        type(module.get_base_layer()) is nn.Linear
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
    )


def _layer_forward(layer: nn.Module, block: Block) -> Callable[..., Any]:
    own: Callable[..., Any] = types.MethodType(type(layer).forward, layer)
    takes = list(inspect.signature(type(layer).forward).parameters)[1:]

    def forward(*args: Any, **kwargs: Any) -> Any:
        """The rewritten layer for whole sequences; the layer's own forward beside a cache or padding."""
        given = {**dict(zip(takes, args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        if given.get("past_key_values") is not None or given.get("cache_params") is not None or _is_cast(hidden):
            return own(*args, **kwargs)
        seq_idx = given.get("seq_idx")
        for name in ("attention_mask", "mamba_attention_mask"):
            mask = given.get(name)
            documents = documents_of(mask)
            seq_idx = documents if seq_idx is None else seq_idx
            if mask is not None and documents is None and mask.dim() == 2:
                return own(*args, **kwargs)
        return block.run(layer, hidden, Inside(given, seq_idx))

    return forward


def _is_cast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on and would cast this tensor for a product: a model in fp32 under bf16 autocast."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and tensor.dtype != torch.get_autocast_dtype(kind)


def _projection_forward(module: LoraLinear) -> Callable[..., Any]:
    own: Callable[..., Any] = types.MethodType(type(module).forward, module)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapted projection; PEFT's own forward for what only that knows."""
        weight = module.get_base_layer().weight
        if args or kwargs or module.merged or _is_cast(weight):
            return own(x, *args, **kwargs)
        return project(module, x.to(weight.dtype) if torch.is_autocast_enabled(x.device.type) else x)

    return forward


def project(
    module: nn.Module,
    x: torch.Tensor,
    *,
    prologue: Prologue | None = None,
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
) -> torch.Tensor:
    """Return `ops.projection` of a linear module, plain or adapted by one LoRA that may be switched off."""
    low_rank = None
    linear: Any = module
    if isinstance(module, LoraLinear):
        linear = module.get_base_layer()
        if not module.disable_adapters and module.active_adapters:
            name = module.active_adapters[0]
            dropout: Any = module.lora_dropout[name]
            low_rank = LowRank(
                module.lora_A[name].weight,
                module.lora_B[name].weight,
                module.scaling[name],
                dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            )
    return projection(
        x,
        linear.weight,
        linear.bias,
        low_rank=low_rank,
        prologue=prologue,
        residual=residual,
        multiplier=multiplier,
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is weight * norm(x), found by running it: names alone would also fit norms that add 1 to the weight."""
    weight = vars(module).get("_parameters", {}).get("weight")
    eps = vars(module).get("variance_epsilon", vars(module).get("eps"))
    if "RMSNorm" not in type(module).__name__ or "Gated" in type(module).__name__ or weight is None or eps is None:
        return False
    if weight.dim() != 1 or weight.device.type == "meta" or "forward" in vars(module) or len(list(module.children())):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=generator).to(weight.device)
    with torch.no_grad():
        copy = type(module).__new__(type(module))
        nn.Module.__init__(copy)
        vars(copy).update({k: v for k, v in vars(module).items() if not k.startswith("_")})
        # A weight other than 1, whatever the model was loaded with, and in fp32, so that both round little.
        probe = torch.linspace(0.5, 1.5, weight.shape[0], device=weight.device)
        copy.weight = nn.Parameter(probe)
        own, ours = copy(x), gated_rms_norm(x, probe, eps=eps)
    return own.shape == ours.shape and bool((own - ours).abs().max() <= NORM_TOLERANCE * ours.abs().max())


def _norm_forward(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    eps = float(vars(module).get("variance_epsilon", vars(module).get("eps")))

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        """weight * norm(x), in one pass."""
        return gated_rms_norm(hidden_states, module.weight, eps=eps)

    return forward
