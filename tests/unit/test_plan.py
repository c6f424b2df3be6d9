"""Plans: counts in closed form, the round trip, and refusal of what was tampered with or cannot act."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmtune import plan as plan_module
from ssmtune.errors import PlacementError, PlanMismatch
from ssmtune.families.base import get_family
from ssmtune.methods.base import get_method
from ssmtune.models import empty_model
from ssmtune.plan import Plan, make_plan
from ssmtune.probe import Uses, probe
from ssmtune.recipe import Edit, Recipe

MICRO = Path(__file__).parents[2] / "benchmarks/shapes/granite-4.0-h-micro.json"


@pytest.fixture(scope="module")
def granite_micro() -> Any:
    """Granite-4.0-H-Micro from the facts of its config, without weights."""
    return empty_model(str(MICRO))


@lru_cache
def tiny(config: str = "dense") -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(get_family("granite_hybrid").tiny_configs()[config])


@pytest.mark.parametrize(
    ("recipe", "trainable"),
    [("attention", 851_968), ("all", 28_823_552), ("all+core", 28_830_464)],
)
def test_counts_of_granite_4_h_micro(granite_micro: Any, recipe: str, trainable: int) -> None:
    plan = make_plan(granite_micro, recipe, rank=16)
    assert (plan.total, plan.trainable) == (3_191_396_096, trainable)
    assert sum(plan.groups.values()) == trainable


def test_counts_of_granite_4_h_micro_by_hand(granite_micro: Any) -> None:
    """rank * (in + out) per projection, from the sizes in the config; three values per head and recurrent layer."""
    facts = json.loads(MICRO.read_text())
    width, rank = facts["hidden_size"], 16
    inner, heads = 2 * width, facts["mamba_n_heads"]
    in_rows = 2 * inner + 2 * facts["mamba_n_groups"] * facts["mamba_d_state"] + heads
    num_recurrent = facts["layer_types"].count("mamba")
    assert num_recurrent == 36
    groups = make_plan(granite_micro, "all+core", rank=rank).groups
    assert groups["recurrent"] == num_recurrent * rank * ((width + in_rows) + (inner + width))
    kv = width // facts["num_attention_heads"] * facts["num_key_value_heads"]
    assert groups["attention"] == 4 * rank * (2 * (width + width) + 2 * (width + kv))
    inside = facts["shared_intermediate_size"]
    assert groups["mlp"] == 40 * rank * ((width + 2 * inside) + (inside + width))
    assert groups["core"] == num_recurrent * 3 * heads


def test_default_rank_is_sixteen(granite_micro: Any) -> None:
    assert make_plan(granite_micro).trainable == 28_830_464


@pytest.mark.parametrize("recipe", ["all+core", "core", "attention", "control:core-discarded"])
@pytest.mark.parametrize("config", ["dense", "moe"])
def test_round_trip_through_json(config: str, recipe: str) -> None:
    plan = make_plan(tiny(config), recipe, rank=3)
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.digest == plan.digest


def test_printed_form_is_the_contract() -> None:
    printed = make_plan(tiny(), "all+core").to_dict()
    assert {"model", "recipe", "total", "trainable", "groups", "sites"} <= set(printed)
    for site in printed["sites"]:
        assert {"role", "layer", "path", "rows", "shape", "method", "num_params"} <= set(site)


def damaged(change: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(make_plan(tiny(), "all+core", rank=3).to_dict()))
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(trainable=d["trainable"] + 1),
        lambda d: d["sites"][0].update(num_params=d["sites"][0]["num_params"] - 1),
        lambda d: d["sites"].pop(),
    ],
    ids=["total-changed", "site-changed", "site-removed"],
)
def test_tampered_counts_are_refused(change: Any) -> None:
    with pytest.raises(PlanMismatch, match="trainable parameters, its sites add up to"):
        Plan.from_dict(damaged(change))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("sites"),
        lambda d: d.pop("inventory_digest"),
        lambda d: d["sites"][0].pop("path"),
        lambda d: d["sites"][0].update(surprise=1),
        lambda d: d.update(sites=None),
        lambda d: d["sites"][0].update(shape=7),
    ],
    ids=["no-sites", "no-digest", "no-path", "unknown-field", "null-sites", "shape-no-list"],
)
def test_missing_or_malformed_fields_are_refused(change: Any) -> None:
    with pytest.raises(PlanMismatch, match="missing or malformed"):
        Plan.from_dict(damaged(change))


def test_digest_follows_sites_and_options() -> None:
    digests = {
        make_plan(tiny(), recipe, rank=rank, alpha=alpha).digest
        for recipe in ("all", "all+core")
        for rank in (2, 3)
        for alpha in (1.0, 2.0)
    }
    assert len(digests) == 8


def test_inventory_digest_tells_models_apart() -> None:
    assert make_plan(tiny("dense"), "all").inventory_digest != make_plan(tiny("moe"), "all").inventory_digest


def with_use(uses: Uses, parameter: str, path: str, use: str) -> Uses:
    by_path = copy.deepcopy(uses.by_path)
    by_path[path][parameter] = use  # type: ignore[assignment]
    return Uses(by_path)


@pytest.mark.parametrize("path", ["train", "eval", "prefill", "decode"])
@pytest.mark.parametrize(("use", "words"), [("READ", "never called .*read raw"), ("NONE", "never used")])
def test_site_that_a_path_does_not_use_is_refused(
    path: str, use: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: a fused kernel on one path swallows the output projection."""
    site = "model.layers.0.mamba.out_proj.weight"
    uses = with_use(probe(tiny()), site, path, use)
    monkeypatch.setattr(plan_module, "probe", lambda model: uses)
    with pytest.raises(PlacementError, match=rf"ssm\.out in layer 0 \({site}\) is {words}.* on path {path}"):
        make_plan(tiny(), "all")
    assert make_plan(tiny(), "attention").trainable > 0


def test_tensor_edit_of_an_unused_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    uses = with_use(probe(tiny()), "model.layers.2.mamba.D", "decode", "NONE")
    monkeypatch.setattr(plan_module, "probe", lambda model: uses)
    with pytest.raises(PlacementError, match=r"ssm\.D in layer 2 .*never used on path decode"):
        make_plan(tiny(), "core")


def test_counts_are_exact_for_packed_experts() -> None:
    plan = make_plan(tiny("moe"), Recipe(name="r", edits=(Edit(method="lora", select=("moe.experts.in",)),)))
    (site, _) = plan.sites
    num_experts, num_out, num_in = site.shape
    assert site.num_params == num_experts * 16 * (num_in + num_out)
    assert site.num_params == get_method("lora").num_params(site.shape, get_method("lora").Options())
