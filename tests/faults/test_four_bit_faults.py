"""Faults of a base in 4 bits: the wrong tensors, too few of them, and codes that changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.tiny import Case, tiny_model
from planting import Make, Run, make_base
from torch import nn

from ssmtune.attach import attach
from ssmtune.errors import AttachError
from ssmtune.four_bit import quantize_linear
from ssmtune.plan import make_plan
from ssmtune.quantize import quantize
from ssmtune.quantized import QuantizeConfig, dense, scales_of

BOTH = QuantizeConfig(components=("attention", "recurrent", "mlp"))


@pytest.mark.parametrize("case", [("mamba", "tied"), ("jamba", "dense")], ids="-".join)
def test_a_tensor_that_is_read_raw(case: Case, run: Run) -> None:
    """`dt_proj` is a linear layer whose weight the mixer reads past it: a skip list of names lets it through."""
    model = quantize(tiny_model(case), BOTH)
    plan = make_plan(model, "all", rank=2)
    adapted = attach(model, plan)
    assert run("four_bits", adapted).ok
    hold_dt_proj(adapted.base_model.model)
    result = run("four_bits", adapted)
    assert not result.ok
    assert "dt_proj.weight" in result.where and "read past its module" in result.detail
    other = quantize(tiny_model(case), BOTH)
    hold_dt_proj(other)
    with pytest.raises(AttachError, match=r"dt_proj\.weight: is in 4 bits, although its values are read past"):
        attach(other, plan)


def hold_dt_proj(model: Any) -> None:
    """Put one `dt_proj` of a model in 4 bits."""
    mixer = next(m for m in model.modules() if "dt_proj" in m._modules)
    mixer.dt_proj = quantize_linear(mixer.dt_proj, BOTH, model.device)


def test_an_output_projection_that_is_left_out(make: Make, run: Run) -> None:
    adapted = make(base=quantize(make_base(), BOTH), num_steps=1)
    mixer = adapted.base_model.model.model.layers[0].mamba
    layer = mixer.out_proj.base_layer
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(dense(layer.weight), requires_grad=False)
    mixer.out_proj.base_layer = plain
    result = run("four_bits", adapted)
    assert not result.ok
    assert result.where == "model.layers.0.mamba.out_proj.weight"
    assert "is not in 4 bits, although the config chooses it" in result.detail


@pytest.mark.parametrize("part", ["code", "scale"])
def test_a_nudged_code_or_scale(make: Make, run: Run, part: str) -> None:
    adapted = make(base=quantize(make_base(), BOTH), num_steps=1)
    assert run("frozen", adapted).ok
    weight = adapted.base_model.model.model.layers[0].mamba.in_proj.base_layer.weight
    held = weight.data if part == "code" else scales_of(weight)["absmax"]
    with torch.no_grad():
        held.view(-1)[0] ^= 1
    result = run("frozen", adapted)
    assert not result.ok
