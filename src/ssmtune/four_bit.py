"""bitsandbytes' 4-bit linear layer as ssmtune uses it. Importing this needs bitsandbytes (`quantize.require_bitsandbytes`).

Dimensions: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn

from ssmtune.base_tensors import owner_of
from ssmtune.quantized import BLOCK, QuantizeConfig, dense


class FourBitLinear(bnb.nn.Linear4bit):
    """bitsandbytes' layer with a forward that changes nothing.

    Theirs repacks the codes in place when it evaluates on some CPUs, converts the bias in place to the input's dtype, and
    keeps the dtype of the first input for good.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, [..., O] in the dtype of `x` [..., I], or in autocast's; W is dequantised to that dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight
        if isinstance(weight, bnb.nn.Params4bit):
            output: torch.Tensor = bnb.matmul_4bit(x, weight, quant_state=weight.quant_state, bias=bias)
            return output
        # An edit of the tensor gives the effective weight.
        return F.linear(x, weight.to(x.dtype), bias)


class Dequantized(nn.Module):
    """The first of the edits of a tensor in 4 bits: gives the next one the values that the codes stand for."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return [O, I] in the dtype that the weight had."""
        return dense(weight)


def quantize_linear(linear: nn.Linear, config: QuantizeConfig, device: torch.device) -> FourBitLinear:
    """Return the layer that stands for `linear` in 4 bits, on `device`; the bias stays as it is."""
    weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=config.double_quant,
        quant_type=config.format,
    ).to(device)
    return _layer_of(weight, linear, device)


def place_quantized(model: nn.Module, path: str, weight: Any) -> None:
    """Put a quantised parameter where the weight named `path` of a plain model is, in a layer of its own kind."""
    owner, name = owner_of(model, path)
    assert name == "weight"
    model.set_submodule(path.rpartition(".")[0], _layer_of(weight, owner, weight.device))


def _layer_of(weight: Any, linear: nn.Linear, device: torch.device) -> FourBitLinear:
    layer = FourBitLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    layer.weight = weight
    layer.quant_state, weight.module = weight.quant_state, layer
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=linear.bias.requires_grad)
    layer.train(linear.training)
    return layer


def pack(weight: Any) -> dict[str, torch.Tensor]:
    """Return a quantised parameter as plain tensors: its codes under "", what belongs to them under bitsandbytes' names."""
    return {"": weight.data, **weight.quant_state.as_dict(packed=True)}


def unpack(tensors: Mapping[str, torch.Tensor], paths: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    """Return `tensors` with those that `pack` made of `paths` (under "PATH.NAME") put together again."""
    found = dict(tensors)
    for path in paths:
        codes = found.pop(path)
        prefix = f"{path}."
        stats = {name.removeprefix(prefix): found.pop(name) for name in list(found) if name.startswith(prefix)}
        found[path] = bnb.nn.Params4bit.from_prequantized(codes, stats, requires_grad=False, device=device)
    return found
