"""The digest of a base changes with its weights, names and shapes, and with nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmtune.base_digest import SAMPLES_PER_TENSOR, base_digest
from ssmtune.errors import SsmtuneError


def small(value: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.linspace(-value, value, parameter.numel()).view_as(parameter) + index)
    return model


def test_equal_weights_have_equal_digests() -> None:
    assert base_digest(small()) == base_digest(small())
    assert len(base_digest(small())) == 16


def test_any_element_of_a_small_tensor_counts() -> None:
    reference = base_digest(small())
    for name, parameter in small().named_parameters():
        for index in range(parameter.numel()):
            model = small()
            with torch.no_grad():
                model.get_parameter(name).view(-1)[index] += 1e-6
            assert base_digest(model) != reference, (name, index)


def test_a_large_tensor_is_sampled_from_end_to_end() -> None:
    model = nn.Linear(100, 100, bias=False)
    reference = base_digest(model)
    stride = 10_000 // SAMPLES_PER_TENSOR
    for index in (0, stride, stride * 200):
        with torch.no_grad():
            kept = model.weight.view(-1)[index].clone()
            model.weight.view(-1)[index] += 1.0
            assert base_digest(model) != reference, index
            model.weight.view(-1)[index] = kept
    assert base_digest(model) == reference


def test_names_and_shapes_count() -> None:
    reference = base_digest(small())
    renamed = nn.Module()
    renamed.a, renamed.b = small()
    assert base_digest(renamed) != reference
    reshaped = small()
    reshaped[0].weight = nn.Parameter(reshaped[0].weight.detach().reshape(7, 5))
    assert base_digest(reshaped) != reference


def test_a_wider_dtype_of_the_same_values_is_the_same_base() -> None:
    model = small().bfloat16()
    rounded = base_digest(model)
    assert base_digest(model.float()) == rounded
    assert base_digest(small()) != rounded


def test_model_stays_as_it_was() -> None:
    model = small()
    before = [parameter.clone() for parameter in model.parameters()]
    base_digest(model)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(before, model.parameters(), strict=True))


def test_model_without_weights_is_refused() -> None:
    """There is nothing to identify: the error must be one of ours, not torch's about meta tensors."""
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(SsmtuneError):
        base_digest(model)
