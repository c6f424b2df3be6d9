"""Recipes by name, and what they select or refuse."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from ssmtune.errors import ConfigError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.inventory import Inventory, take_inventory
from ssmtune.methods.base import get_method, method_names
from ssmtune.placement import TRANSFORMER_NAMES, named_recipe, recipe_names, select_components
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe


@lru_cache
def model(family: str = "granite_hybrid", config: str = "dense") -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(get_family(family).tiny_configs()[config])


@lru_cache
def inventory(family: str = "granite_hybrid", config: str = "dense") -> Inventory:
    return take_inventory(model(family, config))


def roles(recipe: str, family: str = "granite_hybrid", config: str = "dense", **options: Any) -> Counter[str]:
    plan = make_plan(model(family, config), recipe, **options)
    return Counter(site.role for site in plan.sites)


ATTENTION = Counter({"attn.q": 1, "attn.k": 1, "attn.v": 1, "attn.o": 1})
RECURRENT = Counter({"ssm.in": 2, "ssm.out": 2})
MLP = Counter({"mlp.in": 3, "mlp.out": 3})
CORE = Counter({"ssm.A_log": 2, "ssm.D": 2, "ssm.dt_bias": 2})


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("attention", ATTENTION),
        ("attention+core", ATTENTION + CORE),
        ("recurrent", RECURRENT),
        ("recurrent+core", RECURRENT + CORE),
        ("mlp", MLP),
        ("mlp+core", MLP + CORE),
        ("all", ATTENTION + RECURRENT + MLP),
        ("all+core", ATTENTION + RECURRENT + MLP + CORE),
        ("core", CORE),
        ("control:core-discarded", ATTENTION + RECURRENT + MLP + CORE),
        ("control:core-in-place", ATTENTION + RECURRENT + MLP + CORE),
    ],
)
def test_recipe_selects(recipe: str, expected: Counter[str]) -> None:
    """By hand, for a model of two recurrent layers around one of attention, each with an MLP."""
    assert roles(recipe) == expected


def test_recipe_random_takes_half_and_follows_its_seed() -> None:
    found = {seed: frozenset(s.path for s in make_plan(model(), "random", seed=seed).sites) for seed in range(4)}
    assert {len(paths) for paths in found.values()} == {7}
    assert len(set(found.values())) > 1
    assert found[0] == frozenset(s.path for s in make_plan(model(), "random", seed=0).sites)
    assert roles("random+core")["ssm.A_log"] == 2


def test_experts_are_part_of_the_mlp() -> None:
    found = roles("all", config="moe")
    assert found["moe.experts.in"] == 2 and found["moe.experts.out"] == 2 and "moe.router" not in found


def test_partial_recipes_train_whole_small_tensors() -> None:
    assert roles("norm") == {"norm.final": 1, "norm.mixer": 3, "norm.mlp": 3, "ssm.norm": 2}
    assert roles("conv") == {"ssm.conv": 2}
    assert roles("bitfit", config="odd").keys() == {
        *(f"attn.{name}.bias" for name in "qkvo"),
        "ssm.in.bias",
        "ssm.out.bias",
        "ssm.conv.bias",
    }


def test_state_recipes_train_no_tensor_of_the_model() -> None:
    plan = make_plan(model(), "initial-state")
    assert [(s.path, s.shape, s.container) for s in plan.sites] == [
        (f"model.layers.{layer}.mamba.initial_state", (8, 8, 16), "state") for layer in (0, 2)
    ]
    assert {s.shape for s in make_plan(model(), "state-offset-h").sites} == {(8, 8, 16)}
    assert {s.shape for s in make_plan(model(), "state-offset-y").sites} == {(8, 8)}


def test_recipe_names_are_the_placements_and_what_methods_declare() -> None:
    placements = {f"{p}{c}" for p in ("attention", "recurrent", "mlp", "all", "random") for c in ("", "+core")}
    declared = [name for method in method_names() for name in get_method(method).recipes]
    assert len(set(declared)) == len(declared)
    assert set(recipe_names()) == placements | {"transformer-names"} | set(declared)
    for method in method_names():
        for name, edits in get_method(method).recipes.items():
            assert method in {edit.method for edit in edits}, name


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("all+cor", "all+core"), ("atention", "attention"), ("control:core-discard", "control:core-discarded")],
)
def test_unknown_recipe_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe '{wrong.replace('+', '[+]')}' does not exist; nearest: '{near[:3]}"):
        named_recipe(wrong)


def test_recipe_options_reach_the_sites() -> None:
    plan = make_plan(model(), "all", rank=5, alpha=11.0, dropout=0.25)
    assert {(s.options["rank"], s.options["alpha"], s.options["dropout"]) for s in plan.sites} == {(5, 11.0, 0.25)}


def test_transformer_names_are_refused_with_a_table() -> None:
    with pytest.raises(PlacementError) as caught:
        make_plan(model(), "transformer-names")
    message = str(caught.value)
    assert "3 of 7 target names match nothing in this granitemoehybrid: gate_proj, up_proj, down_proj" in message
    lines = {line.split()[0]: line for line in message.splitlines() if line.startswith("  ")}
    assert set(lines) == {"attention", "recurrent", "mlp"}
    assert "4 of    4 sites,   1 of   1 layers" in lines["attention"]
    assert "0 of    4 sites,   0 of   2 layers" in lines["recurrent"] and "ssm.in, ssm.out" in lines["recurrent"]
    assert "0 of    6 sites,   0 of   3 layers" in lines["mlp"] and "mlp.in, mlp.out" in lines["mlp"]
    assert "--recipe all" in message and "--allow-unmatched" in message


def test_transformer_names_with_leave_select_what_matches() -> None:
    plan = make_plan(model(), "transformer-names", allow_unmatched=True)
    assert Counter(s.role for s in plan.sites) == ATTENTION


def test_transformer_names_fit_a_transformer() -> None:
    plan = make_plan(model("llama"), "transformer-names")
    assert {s.path.split(".")[-2] for s in plan.sites} == set(TRANSFORMER_NAMES)


def test_leave_never_excuses_an_empty_selection() -> None:
    edit = Edit(method="lora", modules=("gate_proj", "up_proj"))
    with pytest.raises(PlacementError, match="2 of 2 target names"):
        select_components(inventory(), edit, allow_unmatched=True)


def test_one_bad_entry_of_several_is_refused() -> None:
    edit = Edit(method="lora", select=("attention", "ssm.inn"))
    with pytest.raises(PlacementError, match=r"matches 'ssm\.inn': nearest: 'ssm\.in'"):
        select_components(inventory(), edit, allow_unmatched=False)


def test_leave_does_not_excuse_roles() -> None:
    """`allow_unmatched` is about lists of module names; a misspelt role stays a mistake."""
    edit = Edit(method="lora", select=("attention", "ssm.inn"))
    with pytest.raises(PlacementError, match=r"ssm\.inn"):
        select_components(inventory(), edit, allow_unmatched=True)


@pytest.mark.parametrize("role", ["ssm.A_log", "ssm.conv", "norm.mixer", "ssm.conv.x"])
def test_role_that_the_method_cannot_edit(role: str) -> None:
    with pytest.raises(
        PlacementError, match=rf"role '{role}' exists .* method 'lora' cannot edit it; it can edit: attn"
    ):
        select_components(inventory(), Edit(method="lora", select=(role,)), allow_unmatched=False)


def test_group_without_members_is_refused_when_asked_for_alone() -> None:
    with pytest.raises(PlacementError, match="'core'"):
        make_plan(model("llama"), "core")
    with pytest.raises(PlacementError, match="'recurrent'"):
        make_plan(model("llama"), "recurrent")
    assert not roles("all", "llama").keys() & {"ssm.in", "ssm.out"}


def test_named_core_of_a_transformer_is_refused() -> None:
    """`all+core` on a model without a core would promise what it cannot do."""
    with pytest.raises(PlacementError, match="'core'"):
        make_plan(model("llama"), "all+core")


def test_layers_restrict_and_an_empty_rest_is_refused() -> None:
    found = select_components(inventory(), Edit(method="core", select=("core",), layers=(2,)), allow_unmatched=False)
    assert {c.layer for c in found} == {2} and len(found) == 3
    with pytest.raises(PlacementError, match=r"selects no component .*layers \(1,\)"):
        select_components(inventory(), Edit(method="core", select=("core",), layers=(1,)), allow_unmatched=False)
    with pytest.raises(PlacementError, match="selects no component"):
        select_components(inventory(), Edit(method="core"), allow_unmatched=False)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="method 'lorra' does not exist; nearest: 'lora'"):
        select_components(inventory(), Edit(method="lorra", select=("mlp",)), allow_unmatched=False)


def test_one_tensor_edited_twice_is_refused() -> None:
    twice = Recipe(
        name="twice", edits=(Edit(method="core", select=("core",)), Edit(method="core_in_place", select=("ssm.D",)))
    )
    with pytest.raises(
        PlacementError, match=r"mamba\.D is edited twice \(ssm\.D by 'core' and ssm\.D by 'core_in_place'\)"
    ):
        make_plan(model(), twice)


def test_wrong_option_names_recipe_and_field() -> None:
    recipe = Recipe(name="mine", edits=(Edit(method="lora", select=("mlp",), options={"rnk": 4}),))
    with pytest.raises(ConfigError, match="recipe 'mine', options of 'lora': unknown field 'rnk'.*'rank'"):
        make_plan(model(), recipe)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 50))
def test_share_is_a_share_in_model_order(share: float, seed: int) -> None:
    groups = ("attention", "recurrent", "mlp")
    every = select_components(inventory(), Edit(method="lora", select=groups), allow_unmatched=False)
    edit = Edit(method="lora", select=groups, share=share, seed=seed)
    found = select_components(inventory(), edit, allow_unmatched=False)
    assert len(found) == max(1, round(share * len(every)))
    assert found == [c for c in every if c in found]
    assert found == select_components(inventory(), edit, allow_unmatched=False)


def test_either_of_two_roles_is_selected_where_it_is() -> None:
    edit = Edit(method="lora", select=("ssm.out|gdn.out",))
    for family, config, role in (("granite_hybrid", "dense", "ssm.out"), ("qwen3_5", "dense", "gdn.out")):
        chosen = select_components(inventory(family, config), edit, allow_unmatched=False)
        assert {c.role for c in chosen} == {role}
    with pytest.raises(PlacementError, match=r"matches 'ssm.out\|gdn.out'"):
        select_components(inventory("llama", "dense"), edit, allow_unmatched=False)


def test_allowed_is_all_that_the_method_can_edit() -> None:
    found = inventory()
    chosen = select_components(found, Edit(method="sdt", select=("allowed",)), allow_unmatched=False)
    assert chosen == [c for c in found.everything if get_method("sdt").allows(c)]
    assert {c.role for c in chosen} == {"ssm.A_log", "ssm.in.dt"}
