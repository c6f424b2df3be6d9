"""Faults of the adapter itself: wrong targets, dead or missing adapters, lost precision, moved base tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear
from planting import Make, Run, make_base
from torch import nn

from ssmtune.attach import attach
from ssmtune.errors import AttachError, PlanMismatch
from ssmtune.plan import make_plan
from ssmtune.verify import verify

OUT_PROJ = "model.layers.0.mamba.out_proj"


def test_wrong_targets_are_shown_by_layer(make: Make, run: Run) -> None:
    """V1: the tutorial's target list on a hybrid. The plan is carried out, so it passes; what it misses is named."""
    result = run("coverage", make("transformer-names", allow_unmatched=True))
    assert result.ok
    assert result.where == "not adapted: recurrent, mlp, core"
    assert "attention 4 of 4" in result.detail and "recurrent 0 of 4 (nothing in layers 0, 2)" in result.detail


def test_an_adapter_removed_after_planning(make: Make, run: Run) -> None:
    adapted = make()
    mamba = adapted.base_model.model.model.layers[0].mamba
    mamba.out_proj = mamba.out_proj.base_layer
    result = run("coverage", adapted)
    assert not result.ok and result.where == f"{OUT_PROJ}.weight" and "carries no adapter" in result.detail
    assert result.measured == result.limit - 1


def test_factors_of_another_shape(make: Make, run: Run) -> None:
    adapted = make()
    layer = adapted.base_model.model.get_submodule(OUT_PROJ)
    layer.lora_B["default"].weight = nn.Parameter(layer.lora_B["default"].weight[:-1].clone())
    result = run("coverage", adapted)
    assert not result.ok and result.where == f"{OUT_PROJ}.weight"


def test_an_adapter_outside_the_plan(make: Make, run: Run) -> None:
    adapted = make("attention")
    mamba = adapted.base_model.model.model.layers[0].mamba
    mamba.out_proj = Linear(mamba.out_proj, "default", config=adapted.peft_config["default"], r=2, lora_alpha=2)
    result = run("coverage", adapted)
    assert not result.ok and result.where == OUT_PROJ and "does not contain" in result.detail


@pytest.mark.parametrize("how", ["scale", "switched off", "core switched off"])
def test_a_planned_adapter_that_does_not_act_as_planned(make: Make, run: Run, how: str) -> None:
    adapted = make()
    layer = adapted.base_model.model.get_submodule(OUT_PROJ)
    path = f"{OUT_PROJ}.weight"
    if how == "scale":
        layer.scaling["default"] *= 2
    elif how == "switched off":
        layer.enable_adapters(False)
    else:
        path = "model.layers.2.mamba.dt_bias"
        adapted.edits[path].enabled = False
    result = run("coverage", adapted)
    assert not result.ok and result.where == path


def test_a_stale_plan_is_refused_before_anything_is_touched() -> None:
    plan = make_plan(make_base("odd"), "all+core")
    model = make_base("dense")
    with pytest.raises(PlanMismatch, match="inventory"):
        attach(model, plan)
    attach(model, make_plan(model, "all+core"))


def test_a_core_trained_in_place_in_bf16_does_not_move(make: Make, run: Run) -> None:
    result = run("moved", make("control:core-in-place", dtype=torch.bfloat16))
    assert not result.ok and result.measured == 0
    assert "model.layers.0.mamba.dt_bias" in result.where
    result = run("moved", make("all+core", dtype=torch.bfloat16))
    assert result.ok and result.measured == 1


def test_a_factor_that_never_moved(make: Make, run: Run) -> None:
    adapted = make()
    layer = adapted.base_model.model.get_submodule(OUT_PROJ)
    nn.init.zeros_(layer.lora_B["default"].weight)
    result = run("moved", adapted)
    assert not result.ok and result.where == f"{OUT_PROJ}.weight"


def test_a_nudged_frozen_tensor_breaks_the_digest(make: Make, run: Run) -> None:
    adapted = make()
    assert run("frozen", adapted).ok
    with torch.no_grad():
        adapted.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight[0, 0] += 1e-6
    assert not run("frozen", adapted).ok


def test_a_nudged_frozen_tensor_is_named_where_the_base_can_be_loaded(make: Make, tmp_path: Path) -> None:
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = str(tmp_path / "base")
    adapted = make("attention", base=base)
    assert verify(adapted, checks=["frozen"]).ok
    with torch.no_grad():
        # Not among the values that a digest samples.
        adapted.base_model.model.model.layers[2].mamba.A_log[3] += 1e-6
        adapted.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight[0, 1] += 1e-6
    result = verify(adapted, checks=["frozen"]).checks["frozen"]
    assert not result.ok and result.measured == 2
    assert result.where == "model.layers.1.self_attn.q_proj.weight, model.layers.2.mamba.A_log"


def test_a_broken_tie_is_named(make: Make, run: Run) -> None:
    adapted = make()
    head = adapted.base_model.model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    result = run("frozen", adapted)
    assert not result.ok and "lm_head.weight" in result.where


def test_a_second_wrapping_is_refused(make: Make) -> None:
    adapted = make("attention", num_steps=0)
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(AttachError, match="already carries adapters"):
            attach(model, adapted.plan)
