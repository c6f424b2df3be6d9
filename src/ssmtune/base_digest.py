"""Identify the weights of a base model without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from ssmtune.errors import AttachError
from ssmtune.quantized import is_quantized, logical_shape, quantized_of, scales_of

if TYPE_CHECKING:
    from torch import nn

SAMPLES_PER_TENSOR = 256

Sample = tuple[str, tuple[int, ...], torch.Tensor]
"""Name of a parameter, its shape, and what `sample_of` takes of it, as fp32 on the CPU."""


def base_digest(model: nn.Module) -> str:
    """Return 16 hex digits over every parameter's name, shape and up to 256 evenly spaced values (as fp32).

    Values are compared as fp32 so that a checkpoint loaded in another dtype of the same values is the same base;
    a base rounded to a narrower dtype is another one. A base in 4 bits is the one that it was quantised from
    (`Quantized` has a digest of its own). A model on the meta device has no values and is refused.
    """
    quantized = quantized_of(model)
    return weights_digest(model) if quantized is None else quantized.base_digest


def weights_digest(model: nn.Module) -> str:
    """Return the digest of the weights as they are held: of what is in 4 bits, codes and scales. Raises as `base_digest`."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AttachError(
            "the model has no weights (meta device), so nothing can be attached. Load it with its weights."
        )
    return digest_of_samples(
        sample for name, parameter in model.named_parameters() for sample in _samples(name, parameter)
    )


def _samples(name: str, parameter: torch.Tensor) -> list[Sample]:
    held = [(name, logical_shape(parameter), sample_of(parameter.detach()))]
    if is_quantized(parameter):
        scales = scales_of(parameter).items()
        held += [(f"{name}.{kind}", tuple(value.shape), sample_of(value)) for kind, value in scales]
    return held


def sample_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to 256 evenly spaced values of a tensor (and one more where the division leaves a rest), fp32."""
    flat = tensor.reshape(-1)
    return sample_every(flat.numel(), lambda stride, limit: flat[::stride][:limit])


def sampled_within(num: int, start: int, end: int) -> tuple[int, range]:
    """Return which elements from `start` to `end` are in the sample of a tensor of `num`: the place of the first, and all."""
    stride = max(1, num // SAMPLES_PER_TENSOR)
    first, last = -(-start // stride), min(SAMPLES_PER_TENSOR + 1, -(-end // stride))
    return first, range(first * stride, last * stride, stride)


def sample_every(num: int, every: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """Return the sample of a tensor of `num` elements, of which `every(stride, limit)` gives some."""
    stride = max(1, num // SAMPLES_PER_TENSOR)
    return every(stride, SAMPLES_PER_TENSOR + 1).to("cpu", torch.float32).contiguous()


def digest_of_samples(samples: Iterable[Sample]) -> str:
    """Return the digest of a model from samples of its parameters, in their order in the model."""
    value = hashlib.sha256()
    for name, shape, sample in samples:
        value.update(f"{name}{shape}".encode())
        value.update(sample.numpy().tobytes())
    return value.hexdigest()[:16]
