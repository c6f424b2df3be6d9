"""Attaching: refusals, failures that leave the model alone, and what trainers do to an adapted model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from contracts.tiny import logits_of, loss_of, randomise, tiny_model, tiny_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import LOGITS_MERGED, largest_difference

from ssmtune.attach import AdaptedModel, attach, load
from ssmtune.errors import AttachError, PlacementError, PlanMismatch
from ssmtune.merge import merge
from ssmtune.methods import core
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

DENSE = ("granite_hybrid", "dense")


def layout(model: Any) -> list[Any]:
    """What the instance is made of: modules, their own attributes, hooks, parameters."""
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_pre_hooks), sorted(module._parameters))
        for name, module in model.named_modules()
    ]


def test_adapted_model_is_a_peft_model() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core"))
    assert isinstance(adapted, AdaptedModel) and isinstance(adapted, PeftModel)
    assert adapted.active_adapter == "default"
    trainable, total = adapted.get_nb_trainable_parameters()
    assert trainable == adapted.plan.trainable
    assert total >= adapted.plan.total + trainable


def test_targets_are_full_names() -> None:
    """No suffix or pattern survives into PEFT's config."""
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all"))
    names = {name for name, _ in tiny_model(DENSE).named_modules()}
    assert set(adapted.peft_config["default"].target_modules) <= names


def test_ranks_per_site_reach_their_site_only() -> None:
    recipe = Recipe(
        name="mixed",
        edits=(
            Edit(method="lora", select=("attn.q",), options={"rank": 2, "alpha": 2.0}),
            Edit(method="lora", select=("ssm.in",), options={"rank": 5, "alpha": 20.0}),
        ),
    )
    plan = make_plan(tiny_model(DENSE), recipe)
    adapted = attach(tiny_model(DENSE), plan)
    assert sum(p.numel() for p in adapted.trained_parameters().values()) == plan.trainable
    for site in plan.sites:
        layer = adapted.base_model.model.get_submodule(site.path.removesuffix(".weight"))
        assert layer.r["default"] == site.options["rank"], site.path
        assert layer.scaling["default"] == site.options["alpha"] / site.options["rank"], site.path


def test_two_dropouts_are_refused_and_the_model_left_alone() -> None:
    recipe = Recipe(
        name="mixed",
        edits=(
            Edit(method="lora", select=("attn.q",), options={"dropout": 0.1}),
            Edit(method="lora", select=("ssm.in",), options={"dropout": 0.2}),
        ),
    )
    model = tiny_model(DENSE)
    before = layout(model)
    with pytest.raises(AttachError, match=r"one LoRA dropout, the plan has \[0\.1, 0\.2\]"):
        attach(model, make_plan(tiny_model(DENSE), recipe))
    assert layout(model) == before
    attach(model, make_plan(tiny_model(DENSE), "all"))


def test_fast_require_is_refused_and_the_model_left_alone() -> None:
    model = tiny_model(DENSE)
    before = layout(model)
    with pytest.raises(AttachError, match="fast='require'"):
        attach(model, make_plan(model, "dora"), fast="require")
    assert layout(model) == before


def test_failure_half_way_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit that cannot be built after PEFT's layers are on: everything comes off again."""
    calls = []

    def failing(weight: torch.Tensor, rows: Any, options: Any) -> torch.nn.Module:
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError("planted")
        return core.make_delta(weight, rows, options)

    model = tiny_model(DENSE)
    plan = make_plan(model, "all+core")
    before = layout(model)
    monkeypatch.setattr(core, "METHOD", dataclasses.replace(core.METHOD, make_edit=failing))
    with pytest.raises(MemoryError, match="planted"):
        attach(model, plan)
    assert layout(model) == before
    monkeypatch.undo()
    assert logits_of(attach(model, plan), tiny_tokens(DENSE, 1, 5)).shape == (1, 5, 97)


def test_model_wrapped_by_plain_peft_is_refused() -> None:
    model = tiny_model(DENSE)
    plan = make_plan(model, "all")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    for candidate in (wrapped, model):
        with pytest.raises(AttachError, match="already carries adapters"):
            attach(candidate, plan)


def test_plan_names_both_inventories_on_mismatch() -> None:
    plan = make_plan(tiny_model(DENSE), "all")
    model = tiny_model(("granite_hybrid", "moe"))
    with pytest.raises(PlanMismatch, match=plan.inventory_digest):
        attach(model, plan)


def test_spent_model_names_what_happened() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all"))
    adapted.detach()
    with pytest.raises(AttachError, match="cannot detach this adapted model: it was detached before"):
        adapted.detach()
    with pytest.raises(AttachError, match="cannot merge .* detached before"):
        merge(adapted)


def test_loaded_adapter_can_go_on_training(tmp_path: Any) -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core", rank=3))
    randomise(adapted)
    adapted.save_pretrained(tmp_path, step=7, run_id="r")
    loaded = load(tiny_model(DENSE), tmp_path, trainable=True)
    assert {n for n, p in loaded.trained_parameters().items() if p.requires_grad} == set(adapted.trained_parameters())
    tokens = tiny_tokens(DENSE, 1, 9)
    for model in (adapted, loaded):
        model.eval()
        loss_of(model, tokens).backward()
    for name, parameter in adapted.trained_parameters().items():
        assert torch.equal(parameter.grad, loaded.trained_parameters()[name].grad), name


def test_nested_disabling_restores_each_level() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core")).eval()
    randomise(adapted)
    tokens = tiny_tokens(DENSE, 1, 9)
    on = logits_of(adapted, tokens)
    with adapted.disable_adapter():
        outer = logits_of(adapted, tokens)
        with adapted.disable_adapter():
            assert torch.equal(logits_of(adapted, tokens), outer)
        assert torch.equal(logits_of(adapted, tokens), outer), "the inner block switched the outer one on again"
    assert torch.equal(logits_of(adapted, tokens), on) and not torch.equal(on, outer)


def test_adapters_come_back_after_an_error_inside_the_block() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core")).eval()
    randomise(adapted)
    tokens = tiny_tokens(DENSE, 1, 9)
    on = logits_of(adapted, tokens)
    with pytest.raises(KeyError), adapted.disable_adapter():
        raise KeyError
    assert torch.equal(logits_of(adapted, tokens), on)


def test_deepcopy_is_independent() -> None:
    """Trainers copy a model for a reference or an average; training the copy must leave the original alone."""
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core")).eval()
    randomise(adapted)
    tokens = tiny_tokens(DENSE, 1, 9)
    expected = logits_of(adapted, tokens)
    twin = copy.deepcopy(adapted)
    assert torch.equal(logits_of(twin, tokens), expected)
    randomise(twin, scale=1.0, seed=5)
    assert not torch.equal(logits_of(twin, tokens), expected)
    assert torch.equal(logits_of(adapted, tokens), expected)


def segment_recipe(*roles: str) -> Recipe:
    return Recipe(name="segments", edits=(Edit(method="lora", select=roles, options={"rank": 3, "alpha": 6.0}),))


def test_row_segments_change_their_rows_alone() -> None:
    """LoRA on the rows of x and dt of in_proj: all other rows of the effective weight are the base's own bits."""
    model = tiny_model(DENSE)
    plan = make_plan(model, segment_recipe("ssm.in.x", "ssm.in.dt"))
    rows = {site.key: site.rows for site in plan.sites if site.layer == 0}
    assert rows == {
        "model.layers.0.mamba.in_proj.weight[64:128]": ((64, 128),),
        "model.layers.0.mamba.in_proj.weight[160:168]": ((160, 168),),
    }
    assert plan.trainable == 2 * (3 * (32 + 64) + 3 * (32 + 8))
    base = model.get_parameter("model.layers.0.mamba.in_proj.weight").detach().clone()
    adapted = attach(model, plan)
    randomise(adapted)
    effective = model.model.layers[0].mamba.in_proj.weight.detach()
    same = (effective == base).all(dim=1)
    assert same[:64].all() and same[128:160].all()
    assert not same[64:128].any() and not same[160:168].any()


def test_overlapping_rows_are_refused() -> None:
    with pytest.raises(PlacementError, match=r"in_proj\.weight is edited twice \(ssm\.in by 'lora' and ssm\.in\.x"):
        make_plan(tiny_model(DENSE), segment_recipe("ssm.in", "ssm.in.x"))


def test_shared_tensor_is_edited_once_and_everywhere() -> None:
    """The embedding is tied to the head: one edit, and both of its users see it."""
    model = tiny_model(DENSE)
    plan = make_plan(model, segment_recipe("embed.tokens"))
    assert [(site.container, site.num_params) for site in plan.sites] == [("tensor", 3 * (97 + 32))]
    adapted = attach(model, plan)
    randomise(adapted)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, tiny_model(DENSE).lm_head.weight)
    base = adapted.detach()
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_bias_and_weight_of_one_module() -> None:
    """PEFT's layer around a module and an edit of that module's bias live together."""
    case = ("granite_hybrid", "odd")
    edits = (Edit(method="lora", select=("ssm.in",)), Edit(method="partial", select=("ssm.in.bias",)))
    model = tiny_model(case)
    adapted = attach(model, make_plan(model, Recipe(name="both", edits=edits)))
    randomise(adapted)
    tokens = tiny_tokens(case, 1, 9)
    expected = logits_of(adapted, tokens)
    merged = merge(adapted)
    assert largest_difference(logits_of(merged, tokens), expected) <= LOGITS_MERGED
