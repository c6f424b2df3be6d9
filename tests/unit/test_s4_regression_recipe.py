"""The regression study: equal budgets and equal data for all arms, a warm-up that leaves nothing behind, a whole record."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtune.plan import make_plan
from ssmtune.recipe import Recipe


def load_recipe() -> Any:
    path = Path(__file__).parent.parent.parent / "recipes/study_s4_regression.py"
    spec = importlib.util.spec_from_file_location("study_s4_regression", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RECIPE = load_recipe()
SMALL = RECIPE.Setup(width=8, outputs=3, sequence=6, batch=2, num_steps=2, warmup_steps=2, held_out=3, seeds=2)


def test_all_arms_but_the_doubled_one_have_one_budget() -> None:
    for setup in (RECIPE.Setup(), SMALL):
        model = RECIPE.Problem(setup, 1).frozen_model()
        counts = {
            name: make_plan(model, Recipe(name="arm", edits=edits)).trainable
            for name, edits in RECIPE.arms(setup).items()
        }
        if setup is not SMALL:
            assert counts.pop("lora-double") == 2 * counts["lora"]
            assert len(set(counts.values())) == 1, counts


def test_a_seed_is_one_problem_and_an_arm_one_outcome() -> None:
    first, again, other = (RECIPE.Problem(SMALL, seed) for seed in (3, 3, 4))
    for one, two in zip(first.batch(2, 5), again.batch(2, 5), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.batch(2, 5)[0], other.batch(2, 5)[0])
    assert not torch.equal(first.batch(2, 5)[0], first.batch(2, 6)[0])
    edits = RECIPE.arms(SMALL)["sdt"]
    (adapted, errors), (_, repeated) = (RECIPE.train_arm(problem, edits, 0.01) for problem in (first, again))
    assert errors == repeated
    before = first.frozen_model().state_dict()
    base = adapted.detach().state_dict()
    # The warm-up moved adapters alone: the frozen model is what it was.
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_the_study_compares_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECIPE, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(RECIPE, "TUNING_SEEDS", (1000,))
    result = RECIPE.run_study(SMALL)
    assert [(c["arm"], c["baseline"]) for c in result["comparisons"]] == list(RECIPE.COMPARISONS)
    for arm in result["arms"].values():
        assert arm["rates"][f"{arm['rate']:g}"] == min(arm["rates"].values())
        assert len(arm["log10_error"]) == 2 and all(len(row) == 3 for row in arm["log10_error"])
    for c in result["comparisons"]:
        a, b = (torch.tensor(result["arms"][c[key]]["log10_error"]) for key in ("arm", "baseline"))
        assert c["difference"] == pytest.approx(float((a - b).mean()), abs=1e-6)
