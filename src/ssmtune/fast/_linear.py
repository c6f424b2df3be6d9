"""Linear modules as the rewritten layers use them: what a module's weights and adapter are, and their product."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ssmtune.ops.projection import LowRank, Packed, projection
from ssmtune.ops.projection.spec import Prologue, Weight
from ssmtune.quantized import dense, is_quantized, logical_dtype, logical_shape


class Factors:
    """The two factors of one plain LoRA, with what they become in the products' dtype.

    `rounded` is valid as long as neither factor has been written since.
    """

    def __init__(self, module: LoraLayer) -> None:
        self.module = module
        (self.name,) = module.lora_A
        self.linear: nn.Linear = module.get_base_layer()
        self.dropout = module.lora_dropout[self.name]
        self.rounded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.versions = (-1, -1)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, I] and B [O, r], looked up past `nn.Module`'s attribute access, which costs more than a launch."""
        modules: Any = self.module._modules
        A, B = (modules[side]._modules[self.name]._parameters["weight"] for side in ("lora_A", "lora_B"))
        return A, B

    def low_rank(self) -> LowRank | None:
        """What the projection adds, or None where the adapter is switched off."""
        if self.module._disable_adapters or not self.module.active_adapters:
            return None
        A, B = self.pair()
        dropout = self.dropout.p if self.dropout.training and isinstance(self.dropout, nn.Dropout) else 0.0
        is_current = self.versions == (A._version, B._version)
        return LowRank(A, B, self.module.scaling[self.name], dropout, self.rounded if is_current else None)


def factors_of(module: Any) -> Factors | None:
    """Return the factors of a PEFT layer that is one LoRA over a frozen linear and nothing else; None for any other."""
    if not isinstance(module, LoraLayer) or type(module) is not _layer_class(module.get_base_layer()):
        return None
    if len(module.lora_A) != 1 or module.lora_variant or any(module.lora_bias.values()):
        return None
    return Factors(module)


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is a linear layer and nothing else, its weight in full precision or in 4 bits."""
    return type(module) is nn.Linear or _is_packed(module)


def _is_packed(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and is_quantized(weight)


def _layer_class(linear: nn.Module) -> Any:
    """The class of PEFT's LoRA around a linear layer; None for a layer of any other kind."""
    if not _is_packed(linear):
        return LoraLinear if type(linear) is nn.Linear else None
    # Here and not at the top, since it needs bitsandbytes.
    from peft.tuners.lora.bnb import Linear4bit

    return Linear4bit


def round_factors(factors: Sequence[Factors]) -> None:
    """Round the factors of many layers at once: one by one, launching that would take longer than the products.

    New tensors each time: a backward pass still to come may hold the last ones.
    """
    if not factors:
        return
    pairs = [one.pair() for one in factors]
    with torch.no_grad():
        scaled = torch._foreach_mul([B for _, B in pairs], [one.module.scaling[one.name] for one in factors])
        wide = [*(A for A, _ in pairs), *scaled]
        dtype = logical_dtype(factors[0].linear.weight)
        flat = torch.empty(sum(t.numel() for t in wide), dtype=dtype, device=wide[0].device)
        narrow = torch._C._nn.unflatten_dense_tensors(flat, wide)
        torch._foreach_copy_(narrow, wide)
    for index, (one, (A, B)) in enumerate(zip(factors, pairs, strict=True)):
        one.rounded = narrow[index], narrow[len(factors) + index]
        one.versions = A._version, B._version


ATTRIBUTE = "_ssmtune_factors"


def weights_of(module: nn.Module) -> tuple[Weight, torch.Tensor | None, LowRank | None]:
    """Return the frozen weight and bias of a linear module, plain or adapted, and what its adapter adds at present."""
    factors: Factors | None = module.__dict__.get(ATTRIBUTE)
    linear: nn.Module = module if factors is None else factors.linear
    weight, bias = linear._parameters["weight"], linear._parameters["bias"]
    assert weight is not None
    held: Weight = weight
    if is_quantized(weight):
        held = Packed(partial(dense, weight), logical_shape(weight), logical_dtype(weight))
    return held, bias, None if factors is None else factors.low_rank()


def project(
    module: nn.Module,
    x: torch.Tensor,
    *,
    prologue: Prologue | None = None,
    residual: torch.Tensor | None = None,
    multiplier: float = 1.0,
) -> torch.Tensor:
    """Return `ops.projection` of a linear module, plain or adapted by one LoRA that may be switched off."""
    weight, bias, low_rank = weights_of(module)
    return projection(x, weight, bias, low_rank=low_rank, prologue=prologue, residual=residual, multiplier=multiplier)


def is_cast(linear: nn.Module) -> bool:
    """Return whether autocast is on and would cast a layer's weight for a product: that of a model in fp32, to bf16."""
    weight = linear._parameters["weight"]
    assert weight is not None
    kind = weight.device.type
    return torch.is_autocast_enabled(kind) and logical_dtype(weight) != torch.get_autocast_dtype(kind)


def module_forward(factors: Factors) -> Callable[..., Any]:
    """Return the forward of a PEFT layer that is called by itself; PEFT's own for what only that knows."""
    module, linear = factors.module, factors.linear
    own: Callable[..., Any] = types.MethodType(type(module).forward, module)

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The adapted projection."""
        if args or kwargs or module.merged or is_cast(linear):
            return own(x, *args, **kwargs)
        return project(module, x.to(logical_dtype(linear.weight)) if torch.is_autocast_enabled(x.device.type) else x)

    return forward
