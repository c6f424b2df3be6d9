"""Adapters that released versions saved still load, and mean what they meant (recipes/golden_adapters.py made them)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tolerances import LOGITS_FP32, largest_difference

from ssmtune import adapter_files
from ssmtune.adapter_files import OUR_TENSORS, PEFT_TENSORS
from ssmtune.attach import attach, load

HERE = Path(__file__).parent
SAVED = tuple(sorted(path.parent for path in HERE.glob("*/*/ssmtune.json")))


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("golden_adapters", HERE.parent.parent / "recipes/golden_adapters.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = _recipe()


@pytest.mark.parametrize("directory", SAVED, ids=[str(path.relative_to(HERE)) for path in SAVED])
def test_a_saved_adapter_loads_and_acts_as_it_did(directory: Path) -> None:
    """Bit for bit the adapter with these values put in by hand; within rounding the logits of the day it was saved."""
    base = RECIPE.golden_base(directory.parent / "config.json")
    plain = RECIPE.logits_of(base)
    found = RECIPE.logits_of(load(base, directory))
    by_hand = attach(RECIPE.golden_base(directory.parent / "config.json"), adapter_files.read(directory).plan)
    tensors = {**load_file(directory / PEFT_TENSORS), **load_file(directory / OUR_TENSORS)}
    parameters = by_hand.trained_parameters()
    assert {name.replace(".default", "") for name in parameters} == set(tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name.replace(".default", "")])
    assert torch.equal(found, RECIPE.logits_of(by_hand.eval()))
    saved = load_file(directory.parent / "logits.safetensors")[directory.name]
    # Another processor may sum in another order.
    assert largest_difference(found, saved) < LOGITS_FP32
    assert largest_difference(plain, saved) > 100 * LOGITS_FP32


def test_every_kind_of_container_is_among_them() -> None:
    containers = {site.container for path in SAVED for site in adapter_files.read(path).plan.sites}
    assert containers >= {"module", "tensor", "state"}
    assert {path.parent.name for path in SAVED} == {"0.1.0"}
