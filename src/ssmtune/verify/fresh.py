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
        tensors[base_name(name)] = parameter.detach()
    return tensors


def build_base(config: Any, tensors: Mapping[str, torch.Tensor], *, device: torch.device | str) -> PreTrainedModel:
    """Return a model of `config` that holds `tensors` themselves (on the meta device: nothing but those)."""
    from ssmtune.models import auto_class

    with torch.device(device):
        model: PreTrainedModel = auto_class(config).from_config(deepcopy(config))
    # Tied names are absent from `tensors` and tied again below.
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def attention_of(adapted: AdaptedModel) -> str:
    """The attention implementation in use; another one would round elsewhere."""
    return str(adapted.base_model.model.config._attn_implementation)


def dtype_name(adapted: AdaptedModel) -> Dtype:
    """The base's dtype as `load_model` takes it."""
    return DTYPES.get(adapted.base_model.model.dtype, "auto")


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
        copies = {name: tensor.clone() for name, tensor in base_tensors(adapted).items()}
        return build_base(adapted.base_model.model.config, copies, device=device)
    base = load_model(subject.base_name, dtype=dtype_name(adapted), device=str(device))
    base.set_attn_implementation(attention_of(adapted))
    return base.eval()
