"""The base model again: its tensors as they are inside an adapted model, and a new model made of them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.base_digest import base_digest
from ssmtune.base_tensors import base_name
from ssmtune.errors import ConfigError
from ssmtune.models import Dtype, load_model
from ssmtune.quantize import load_base
from ssmtune.quantized import MARK, QuantizeConfig, Quantized, is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.attach import AdaptedModel
    from ssmtune.verify.base import Subject

DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def base_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return the frozen tensors inside `adapted` by their name in the base model; views, not copies."""
    trained = {id(p) for p in adapted.trained_parameters().values()}
    tensors = {}
    for name, parameter in adapted.base_model.model.named_parameters():
        if id(parameter) in trained or ".lora_" in name:
            continue
        # Detached, it would be codes that nothing belongs to.
        tensors[base_name(name)] = parameter if is_quantized(parameter) else parameter.detach()
    return tensors


def build_base(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str,
    quantized: Quantized | None = None,
) -> PreTrainedModel:
    """Return a model of `config` that holds `tensors` themselves (on the meta device: nothing but those).

    `quantized` says of those that are in 4 bits what they are.
    """
    from ssmtune.models import auto_class

    with torch.device(device):
        model: PreTrainedModel = auto_class(config).from_config(deepcopy(config))
    codes = {name: tensor for name, tensor in tensors.items() if is_quantized(tensor)}
    # Tied names are absent from `tensors` and tied again below.
    model.load_state_dict({n: t for n, t in tensors.items() if n not in codes}, strict=False, assign=True)
    model.tie_weights()
    if codes:
        from ssmtune.four_bit import place_quantized

        for name, tensor in codes.items():
            place_quantized(model, name, tensor)
        vars(model)[MARK] = quantized
    return model.eval()


def attention_of(adapted: AdaptedModel) -> str:
    """The attention implementation in use; another one would round elsewhere."""
    return str(adapted.base_model.model.config._attn_implementation)


def dtype_name(adapted: AdaptedModel) -> Dtype:
    """The base's dtype as `load_model` takes it."""
    return DTYPES.get(adapted.base_model.model.dtype, "auto")


def quantize_config_of(adapted: AdaptedModel) -> QuantizeConfig | None:
    """What of the base is in 4 bits, as `load_base` takes it."""
    return None if adapted.quantized is None else adapted.quantized.config


def find_base_name(adapted: AdaptedModel, name: str) -> str | None:
    """Return `name` when loading it gives the weights that `adapted` was attached to, else None."""
    try:
        base = load_model(name, dtype=dtype_name(adapted))
    except ConfigError:
        return None
    return name if base_digest(base) == adapted.base_digest else None


def fresh_base(subject: Subject) -> PreTrainedModel:
    """Return a new base model without adapters on the device of the subject, loaded again where it can be loaded."""
    adapted = subject.adapted
    device = adapted.base_model.model.device
    if subject.base_name is None:
        copies = {n: deepcopy(t) if is_quantized(t) else t.clone() for n, t in base_tensors(adapted).items()}
        return build_base(adapted.base_model.model.config, copies, device=device, quantized=adapted.quantized)
    base = load_base(
        subject.base_name, dtype=dtype_name(adapted), device=str(device), quantize_config=quantize_config_of(adapted)
    )
    base.set_attn_implementation(attention_of(adapted))
    return base.eval()
