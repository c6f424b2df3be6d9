"""Identify the weights of a base model without reading all of them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from ssmtune.errors import AttachError

if TYPE_CHECKING:
    from torch import nn

SAMPLES_PER_TENSOR = 256


def base_digest(model: nn.Module) -> str:
    """Return 16 hex digits over every parameter's name, shape and up to 256 evenly spaced values (as fp32).

    Values are compared as fp32 so that a checkpoint loaded in another dtype of the same values is the same base;
    a base rounded to a narrower dtype is another one. A model on the meta device has no values and is refused.
    """
    value = hashlib.sha256()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AttachError(
            "the model has no weights (meta device), so nothing can be attached. Load it with its weights."
        )
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // SAMPLES_PER_TENSOR)
        sample = flat[::stride][: SAMPLES_PER_TENSOR + 1].to("cpu", torch.float32).contiguous()
        value.update(f"{name}{tuple(parameter.shape)}".encode())
        value.update(sample.numpy().tobytes())
    return value.hexdigest()[:16]
