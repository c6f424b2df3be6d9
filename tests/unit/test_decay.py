"""Weight decay by site: which trained tensors are pulled back to the pretrained value, and how strongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from contracts.tiny import tiny_model

from ssmtune.attach import attach
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.sft import EditTrainer, grouped_parameters
from ssmtune.train import OptimizerConfig

MAMBA = ("mamba", "biases")
DENSE = ("granite_hybrid", "dense")


def decays(case: Any, recipe: str | Recipe) -> dict[str, tuple[str, float]]:
    """(optimiser group, decay) of each trained tensor, as the trainer builds its AdamW."""
    model = tiny_model(case)
    adapted = attach(model, make_plan(model, recipe))
    trainer = SimpleNamespace(
        adapted=adapted, groups=grouped_parameters(adapted), optimizer_config=OptimizerConfig(weight_decay=0.5)
    )
    optimizer = EditTrainer.create_optimizer(cast(Any, trainer))
    names = {id(p): name for name, p in adapted.trained_parameters().items()}
    found = {names[id(p)]: (g["name"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == adapted.trained_parameters().keys()
    return found


def test_v2_pulls_biases_a_hundredfold_and_the_rest_tenfold() -> None:
    for recipe in ("core-v2", "conv-v2", "bitfit-v2"):
        for name, (group, decay) in decays(MAMBA, recipe).items():
            assert (group, decay) == ("core", 50.0 if name.endswith("bias") else 5.0), name


@pytest.mark.parametrize("recipe", ["core", "conv", "bitfit", "norm"])
def test_small_tensors_do_not_decay_unless_asked(recipe: str) -> None:
    assert set(decays(MAMBA, recipe).values()) == {("core", 0.0)}


def test_projections_decay_and_magnitudes_do_not() -> None:
    assert set(decays(DENSE, "all").values()) == {("lora", 0.5)}
    rows = Recipe(name="rows", edits=(Edit(method="dora", select=("ssm.in.x", "attn.q")),))
    found = decays(DENSE, rows)
    assert {name for name, (_, decay) in found.items() if decay == 0.0} == {n for n in found if "magnitude" in n}
    assert len({"ssm" if "mamba" in n else "attention" for n in found if "magnitude" in n}) == 2
    scales = decays(DENSE, "prodial")
    assert {name for name, (_, decay) in scales.items() if decay == 0.0} == {n for n in scales if "lora_scale" in n}


def test_decay_pulls_a_change_back_to_the_pretrained_value() -> None:
    """Without a gradient, decay alone brings the effective tensor nearer to the base, and never to zero."""
    model = tiny_model(MAMBA)
    adapted = attach(model, make_plan(model, "core-v2"))
    parameters = adapted.trained_parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    trainer = SimpleNamespace(
        adapted=adapted, groups=grouped_parameters(adapted), optimizer_config=OptimizerConfig(weight_decay=1.0)
    )
    EditTrainer.create_optimizer(cast(Any, trainer)).step()
    for name, parameter in parameters.items():
        expected = 1 - OptimizerConfig().core_learning_rate * (100.0 if name.endswith("bias") else 10.0)
        assert torch.allclose(parameter, torch.tensor(expected)), name
