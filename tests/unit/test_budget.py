"""Plans fitted to a budget: as near as any rank comes without exceeding it, by brute force."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmtune.errors import PlacementError
from ssmtune.families.base import get_family
from ssmtune.methods.base import get_method, method_names
from ssmtune.plan import Plan, make_plan
from ssmtune.recipe import Edit, Recipe

LARGEST_RANK = 32
"""The smaller side of the largest matrix of the tiny model: a higher rank adds nothing."""


@lru_cache
def tiny() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(get_family("granite_hybrid").tiny_configs()["dense"])


@lru_cache
def counts(recipe: str) -> dict[int, int]:
    """Trained parameters at each rank, from the sites of a plan of its own closed form."""
    sites = make_plan(tiny(), recipe, rank=1).sites
    found = {}
    for rank in range(1, LARGEST_RANK + 1):
        found[rank] = 0
        for site in sites:
            method = get_method(site.method)
            options = {**site.options, "rank": rank} if "rank" in site.options else site.options
            found[rank] += method.num_params(site.shape, method.Options(**options))
    return found


@pytest.mark.parametrize("recipe", ["all+core", "random", "dora", "prodial", "adalora"])
def test_no_rank_comes_nearer(recipe: str) -> None:
    totals = counts(recipe)
    for wanted in (totals[1], totals[2] - 1, totals[9]):
        plan = make_plan(tiny(), recipe, budget=wanted)
        best = max(total for total in totals.values() if total <= wanted)
        assert plan.trainable == best
        assert plan.budget is not None
        assert totals[plan.budget.size] == best and plan.budget.left == wanted - best
        ranks = {site.options["rank"] for site in plan.sites if "rank" in site.options}
        assert ranks == {plan.budget.size}
        assert plan.budget.fixed == sum(s.num_params for s in plan.sites if "rank" not in s.options)


def test_below_the_minimum_names_the_minimum() -> None:
    minimum = counts("all+core")[1]
    with pytest.raises(PlacementError, match=f"smallest plan .* trains {minimum:,} .*Give at least {minimum:,}"):
        make_plan(tiny(), "all+core", budget=minimum - 1)


@pytest.mark.parametrize("recipe", ["core", "initial-state", "bitfit", "full"])
def test_methods_of_a_fixed_size_say_so(recipe: str) -> None:
    with pytest.raises(PlacementError, match="have a fixed size"):
        make_plan(tiny(), recipe, budget=10**6)


def test_a_budget_beyond_full_rank_ends_there() -> None:
    plan = make_plan(tiny(), "all", budget=10**9)
    assert plan.budget is not None
    assert plan.budget.size == LARGEST_RANK == max(min(site.shape) for site in plan.sites)
    pissa = make_plan(tiny(), "all", budget=10**9, init="pissa")
    assert pissa.budget is not None
    assert pissa.budget.size == min(min(site.shape) for site in pissa.sites)


def test_scale_of_the_product_stays() -> None:
    site = make_plan(tiny(), "all", rank=4, alpha=6.0, budget=20_000).sites[0]
    assert site.options["alpha"] / site.options["rank"] == 1.5
    assert make_plan(tiny(), "all", rank=4, alpha=6.0, scaling="rs", budget=20_000).sites[0].options["alpha"] == 6.0


def test_random_placement_meets_the_budget_of_the_other_arm() -> None:
    """The null of a placement study: other sites, the same count up to one rank."""
    wanted = make_plan(tiny(), "attention", rank=24).trainable
    for seed in range(3):
        null = make_plan(tiny(), "random", budget=wanted, seed=seed)
        step = sum(sum(site.shape) for site in null.sites)
        assert wanted - step < null.trainable <= wanted


def test_a_fitted_plan_comes_back_from_json() -> None:
    plan = make_plan(tiny(), "all", budget=20_000)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    older = plan.to_dict()
    del older["budget"]
    assert Plan.from_dict(older).sites == plan.sites


def test_the_named_size_is_an_option_that_counts() -> None:
    """Every method that names a size trains more with a larger one, whatever its other options."""
    for name in method_names():
        method = get_method(name)
        if method.size_option:
            small, large = (method.num_params((12, 20), method.Options(**{method.size_option: n})) for n in (2, 3))
            assert 0 < small < large, name


def test_a_recipe_of_one_s_own_is_fitted() -> None:
    edits = (Edit(method="lora", select=("ssm.in.x",)), Edit(method="lora", select=("mlp.in",), layers=(0,)))
    plan = make_plan(tiny(), Recipe(name="own", edits=edits), budget=5_000)
    step = sum(sum(site.shape) for site in plan.sites)
    assert 5_000 - step < plan.trainable <= 5_000
