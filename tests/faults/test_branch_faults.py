"""Faults of branches beside blocks, each of which a check of `verify` must name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.tiny import tiny_model
from planting import Make, Run

from ssmtune.attach import AdaptedModel
from ssmtune.errors import TrainingFailed
from ssmtune.recipe import Edit, Recipe
from ssmtune.watch import _refuse_dead

PLAIN = ("llama", "dense")


def opened(make: Make) -> AdaptedModel:
    """A trained adapter whose gates are far enough open for a fault behind them to show."""
    adapted = make("hankel", base=tiny_model(PLAIN))
    with torch.no_grad():
        for name, parameter in adapted.edit_parameters().items():
            if name.endswith(".gate"):
                parameter.fill_(3.0)
    return adapted


def replace_forward(adapted: AdaptedModel, change: Any) -> None:
    """Let every branch see what `change` makes of (x, seq_idx, padding_mask, entering)."""
    for edit in adapted.edits.values():
        branch: Any = edit
        whole = branch.forward
        branch.forward = lambda *given, whole=whole: whole(*change(*given))


def test_a_sound_branch_passes(make: Make, run: Run, same_process: None) -> None:
    adapted = opened(make)
    for check in ("coverage", "liveness", "paths_agree", "moved", "packing", "padding", "merge", "reload"):
        result = run(check, adapted)
        assert result.ok, (check, result.where, result.detail)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        # The published code generates without the recurrence's state.
        ("paths_agree", lambda x, documents, mask, entering: (x, documents, mask, None)),
        ("packing", lambda x, documents, mask, entering: (x, None, mask, entering)),
        ("padding", lambda x, documents, mask, entering: (x, documents, None, entering)),
    ],
)
def test_a_branch_that_does_not_see_its_call(check: str, change: Any, make: Make, run: Run) -> None:
    adapted = opened(make)
    replace_forward(adapted, change)
    result = run(check, adapted)
    assert not result.ok, result.detail


def test_a_branch_that_is_not_run(make: Make, run: Run) -> None:
    edits = (Edit(method="hankel", select=("block.mlp",)), Edit(method="lora", select=("attention",)))
    adapted = make(Recipe(name="both", edits=edits), base=tiny_model(PLAIN))
    adapted._branches.remove()  # type: ignore[attr-defined]
    result = run("liveness", adapted)
    assert not result.ok and ".mlp.branch." in result.where


def test_a_branch_that_is_switched_off_or_did_not_train(make: Make, run: Run) -> None:
    adapted = make("hankel", base=tiny_model(PLAIN), num_steps=0)
    result = run("moved", adapted)
    assert not result.ok and "model.layers.0.mlp.branch" in result.where
    next(iter(adapted.edits.values())).enabled = False
    result = run("coverage", adapted)
    assert not result.ok and "model.layers.0.mlp.branch" in result.where


def test_a_branch_of_another_order_than_planned(make: Make, run: Run) -> None:
    adapted = opened(make)
    branch: Any = next(iter(adapted.edits.values()))
    branch.B = torch.nn.Parameter(branch.B[1:].detach())
    result = run("coverage", adapted)
    assert not result.ok and "the plan says" in result.detail


def test_training_stops_at_a_branch_that_gets_no_gradient(make: Make) -> None:
    """Its gate alone learns at first, and that is no fault; nothing of it learning is one."""
    adapted = make("hankel", base=tiny_model(PLAIN), num_steps=0)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    adapted(input_ids=ids, labels=ids).loss.backward()
    parameters = adapted.trained_parameters()
    _refuse_dead({"state": parameters}, set())
    first = next(name for name in parameters if name.endswith("layers.0.mlp.branch.gate"))
    parameters[first].grad = torch.zeros(1)
    with pytest.raises(TrainingFailed, match=r"5 trained .*model\.layers\.0\.mlp\.branch"):
        _refuse_dead({"state": parameters}, set())
