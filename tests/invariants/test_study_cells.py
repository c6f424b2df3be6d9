"""Cells of a study on a real model: what the axes change in training, and what a cell returns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import rich.console
from invariants.micro import micro_run, train_micro

from ssmtune import records, sft, study
from ssmtune.config import decode
from ssmtune.study_config import StudyConfig
from ssmtune.study_runs import cost_of, run_cell, study_inputs


def trained_rows(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[str]]:
    """The rows of every training step, in order, and the paths that were adapted."""
    seen: list[Any] = []
    original = sft.EditTrainer.compute_loss
    paths: list[str] = []

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        if self.model.training:
            seen.append(inputs["input_ids"].tolist())
            paths[:] = [site.path for site in self.adapted.plan.sites]
        return original(self, model, inputs, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sft.EditTrainer, "compute_loss", compute_loss)
        train_micro(settings)
    return seen, paths


def test_data_order_seed_and_draw_are_independent(
    micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for seed, order, draw in ((0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 2)):
        settings = micro_run(micro_model, micro_data, tmp_path / f"{seed}{order}{draw}", recipe="random", max_steps=2)
        settings |= {"seed": seed, "data_order": order, "placement_seed": draw}
        found[seed, order, draw] = trained_rows(settings, monkeypatch)
    rows, paths = found[0, 3, 1]
    assert found[1, 3, 1] == (rows, paths), "another seed, the same rows and places"
    assert found[0, 4, 1][0] != rows and found[0, 4, 1][1] == paths
    assert found[0, 3, 2][0] == rows and found[0, 3, 2][1] != paths


def test_a_cell_trains_once_and_is_evaluated_on_every_task(
    micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Runs of a tree with changes are provisional, and a test may be run on one.
    monkeypatch.setattr(records, "_git_state", lambda: ("0" * 40, False))
    whole = {
        "name": "micro",
        "models": {"micro": str(micro_model)},
        "tasks": [{"name": "classification", "size": "0.001", "primary": "exact"}],
        "transfer": [{"name": "rules", "size": "0.002", "primary": "severity"}],
        "seeds": [0],
        "cells": {"base": {}, "all": {"recipe": "all"}},
        "comparisons": [["all", "base"]],
        "families": {"transfer": {"comparisons": [["all", "base"]], "on": "transfer"}},
        "tune": {"seed": 9, "learning_rate": [1.0e-3, 1.0e-1]},
        "train": {"max_steps": 2, "num_evaluations": 1, "rows_per_step": 1, "lora": {"rank": 2}},
        "num_examples": 2,
        "output_dir": str(tmp_path),
        "workers": 0,
    }
    config = decode(StudyConfig, whole, where="study.yaml")
    inputs = study_inputs(config)
    assert {"catalogue", "task/classification", "task/rules", "model/micro/model.safetensors"} == set(inputs)
    ahead = study.estimate_study(config, cost_of, inputs=inputs)
    assert (ahead.num_cells, ahead.num_tuning, ahead.questions) == (5, 2, 2 + 2 + 4) and ahead.tokens > 0
    quiet = rich.console.Console(file=io.StringIO())
    result = study.run_study(config, run_cell, inputs=inputs, console=quiet)
    assert result["failures"] == [] and result["num_cells"]["expected"] == 5
    found = study.read_cells(config, inputs=inputs)
    (cell,) = [r for r in found if (r["kind"], r["name"]) == ("study_cell", "micro: all")]
    assert cell["train"]["config"]["optimizer"]["learning_rate"] == cell["tuned"]["learning_rate"] in (1e-3, 1e-1)
    assert [e["task"] for e in (cell["evaluate"], *cell["transfer"])] == ["classification", "rules"]
    assert [len(e["example_ids"]) for e in (cell["evaluate"], *cell["transfer"])] == [2, 2]
    assert {path.parent.name for path in (tmp_path / "runs").glob("*/adapter")} == {
        Path(cell["config"]["run_dir"]).name
    }
