"""What no edit may touch, and edits that are given up at the merge: frozen and restored queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.tiny import Case, randomise, tiny_model

from ssmtune.attach import attach
from ssmtune.errors import ConfigError, PlacementError
from ssmtune.merge import merge
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.recipe import Edit, Recipe

DENSE: Case = ("granite_hybrid", "dense")
QK = ("attn.q", "attn.k")


def plan_of(case: Case, recipe: str, *without: str) -> Plan:
    return make_plan(tiny_model(case), named_recipe(recipe, rank=2, without=without))


@pytest.mark.parametrize("recipe", ["all", "dora", "full", "random"])
def test_no_edit_touches_what_is_left_out(recipe: str) -> None:
    free = {site.key for site in plan_of(DENSE, recipe).sites}
    held = {site.key for site in plan_of(DENSE, recipe, *QK).sites}
    assert not any(f".{letter}_proj." in key for key in held for letter in "qk")
    if recipe != "random":
        assert free - held == {key for key in free if ".q_proj." in key or ".k_proj." in key} != set()


def test_rows_of_a_fused_tensor_are_left_out() -> None:
    """The input projection of a Mamba-2 layer holds five roles: without one, the other four are edited as rows."""
    plan = plan_of(DENSE, "recurrent", "ssm.in.dt")
    parts = {site.role: site.rows for site in plan.sites if site.path.endswith("layers.0.mamba.in_proj.weight")}
    assert set(parts) == {"ssm.in.z", "ssm.in.x", "ssm.in.B", "ssm.in.C"}
    whole = plan_of(DENSE, "recurrent").sites[0].shape[0]
    left = sum(end - first for rows in parts.values() for first, end in rows or ())
    (dt,) = (c for c in plan_of_rows("ssm.in.dt").sites if c.layer == 0)
    assert left + dt.shape[0] == whole


def plan_of_rows(role: str) -> Plan:
    return make_plan(tiny_model(DENSE), Recipe(name="rows", edits=(Edit(method="lora", select=(role,)),)))


def test_a_method_that_takes_no_rows_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"'full' edits ssm\.in .*only as a whole"):
        plan_of(DENSE, "full", "ssm.in.dt")


def test_leaving_out_a_whole_tensor_leaves_out_its_rows() -> None:
    edits = (Edit(method="lora", select=("ssm.in.x", "ssm.out")),)
    with pytest.raises(PlacementError, match="which it forbids"):
        make_plan(tiny_model(DENSE), Recipe(name="both", edits=edits, without=("ssm.in",)))
    plan = make_plan(tiny_model(DENSE), Recipe(name="one", edits=edits, without=("attn.q",)))
    assert {site.role for site in plan.sites} == {"ssm.in.x", "ssm.out"}


def test_leaving_out_what_is_not_there_names_the_nearest() -> None:
    with pytest.raises(PlacementError, match=r"without 'attn\.qq': nothing .*'attn\.q'"):
        plan_of(DENSE, "all", "attn.qq")


def moved(recipe: str | Recipe) -> Any:
    model = tiny_model(DENSE)
    adapted = attach(model, make_plan(model, recipe))
    randomise(adapted)
    return adapted


def test_restored_roles_are_the_base_again_and_no_others() -> None:
    before = dict(tiny_model(DENSE).named_parameters())
    everything = {site.path for site in make_plan(tiny_model(DENSE), "all").sites}
    merged = dict(merge(moved("all"), restore=QK).named_parameters())
    same = {path for path in everything if torch.equal(merged[path], before[path])}
    assert same == {path for path in everything if ".q_proj." in path or ".k_proj." in path} != set()


def test_restored_rows_of_a_whole_edit_are_the_base_again() -> None:
    before = dict(tiny_model(DENSE).named_parameters())
    (dt,) = (site for site in plan_of_rows("ssm.in.dt").sites if site.layer == 0)
    ((first, end),) = dt.rows or ()
    merged = dict(merge(moved("recurrent"), restore=("ssm.in.dt",)).named_parameters())
    assert torch.equal(merged[dt.path][first:end], before[dt.path][first:end])
    assert not bool((merged[dt.path][:first] == before[dt.path][:first]).all(dim=1).any())


@pytest.mark.parametrize("role", ["attn.qq", "attn.q"])
def test_restoring_what_no_edit_touches_is_refused(role: str) -> None:
    with pytest.raises(ConfigError, match=rf"restore '{role}': no edit"):
        merge(moved("recurrent"), restore=(role,))
