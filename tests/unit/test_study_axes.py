"""The axes of a study: models, transfer, data orders, draws of a random placement, and rates chosen beforehand."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import synthetic_records as synthetic

from ssmtune import config as decoding
from ssmtune import records, study
from ssmtune.errors import ConfigError, TrainingFailed
from ssmtune.study import CellSpec, StudyConfig, expand
from ssmtune.study_estimate import Cost, calibration_cells
from ssmtune.study_runs import _train_config

QUIET = rich.console.Console(file=io.StringIO())
MODELS = {"granite": "zoo/granite", "plain": "zoo/plain"}
TASKS = [{"name": name, "size": "0.1", "primary": "exact"} for name in ("rules", "mapping")]


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git and the device for every record would be most of the time of these tests."""
    monkeypatch.setattr(records, "environment", lambda: synthetic.ENVIRONMENT)


def make(folder: Path, **changes: Any) -> StudyConfig:
    """Two models, one of which lacks an arm; two tasks, a third for transfer alone; two seeds."""
    whole = {
        "name": "axes",
        "models": MODELS,
        "tasks": TASKS,
        "transfer": [*TASKS, {"name": "classification", "size": "0.1", "primary": "exact"}],
        "seeds": [0, 1],
        "cells": {
            "base": {},
            "attention": {"recipe": "attention"},
            "recurrent": {"recipe": "recurrent", "models": ["granite"]},
        },
        "comparisons": [["attention", "base"], ["recurrent", "attention"]],
        "output_dir": str(folder),
        "workers": 0,
        **changes,
    }
    return decoding.decode(StudyConfig, whole, where="study.yaml")


def run(config: StudyConfig, cell: Any = synthetic.cheap_cell) -> dict[str, Any]:
    return study.run_study(config, cell, console=QUIET)


def test_every_cell_runs_on_its_models_and_is_evaluated_on_the_other_tasks(tmp_path: Path) -> None:
    cells = expand(make(tmp_path))
    # Bases: 2 models x 3 tasks. Trained: (2 arms + 1 arm) x 2 tasks x 2 seeds.
    assert len(cells) == 6 + 12
    trained = [cell.spec for cell in cells if cell.spec.recipe]
    assert {(s.cell, s.model_name, s.model) for s in trained} == {
        ("attention", "granite", "zoo/granite"),
        ("recurrent", "granite", "zoo/granite"),
        ("attention", "plain", "zoo/plain"),
    }
    assert {s.task: [t.name for t in s.transfer] for s in trained} == {
        "rules": ["mapping", "classification"],
        "mapping": ["rules", "classification"],
    }
    assert len({cell.path for cell in cells}) == len({cell.digest for cell in cells}) == len(cells)
    assert len({cell.spec.run_dir for cell in cells}) == len(cells)


def test_transfer_and_models_form_panels_and_a_family_of_their_own(tmp_path: Path) -> None:
    families = {"transfer": {"comparisons": [["attention", "base"]], "on": "transfer", "models": ["granite"]}}
    result = run(make(tmp_path, families=families))
    assert [table["task"] for table in result["tasks"]][:5] == [
        "granite: rules",
        "granite: mapping",
        "plain: rules",
        "plain: mapping",
        "granite: rules -> mapping",
    ]
    # Attention against the base on 2 models x 2 tasks, recurrent against attention on one model x 2 tasks.
    assert [(f["name"], f["num_comparisons"]) for f in result["families"]] == [("declared", 6), ("transfer", 4)]
    assert result["num_comparisons"] == 10 and len(result["comparisons"]) == 10
    moved = [c for c in result["comparisons"] if c["family"] == "transfer"]
    assert {(c["trained_on"], c["evaluated_on"]) for c in moved} == {
        ("rules", "mapping"),
        ("rules", "classification"),
        ("mapping", "rules"),
        ("mapping", "classification"),
    }
    one = next(c for c in moved if c["task"] == "granite: rules -> classification")
    cells = {(r["name"], r["task"], r["seed"]): r for r in study.read_cells(make(tmp_path, families=families))}
    arm = [cells["granite: attention", "rules", seed]["transfer"][1]["metrics"]["exact"] for seed in (0, 1)]
    base = cells["granite: base", "classification", 0]["evaluate"]["metrics"]["exact"]
    assert one["difference"] == pytest.approx(sum(arm) / 2 - base)
    # Holm over a family alone.
    smallest = min(c["p"] for c in moved)
    assert min(c["p_holm"] for c in moved) == pytest.approx(min(1.0, 4 * smallest))


def test_data_orders_and_draws_are_run_with_every_seed(tmp_path: Path) -> None:
    cells = {"attention": {"recipe": "attention"}, "random": {"recipe": "random", "draws": [7, 8, 9]}}
    config = make(
        tmp_path,
        models={},
        model="tiny-granite-h",
        data_orders=[0, 5],
        cells=cells,
        comparisons=[["attention", "random"]],
    )
    specs = [cell.spec for cell in expand(config) if cell.spec.task == "rules"]
    assert sorted((s.seed, s.data_order) for s in specs if s.cell == "attention") == [(0, 0), (0, 5), (1, 0), (1, 5)]
    assert sorted({(s.seed, s.data_order, s.draw) for s in specs if s.cell == "random"}) == [
        (seed, order, draw) for seed in (0, 1) for order in (0, 5) for draw in (7, 8, 9)
    ]
    fields = _train_config(next(s for s in specs if (s.seed, s.data_order, s.draw) == (1, 5, 8)), {})
    assert (fields.seed, fields.data_order, fields.placement_seed) == (1, 5, 8)
    result = run(config)
    arms = {arm["name"]: arm for arm in result["tasks"][0]["arms"]}
    assert (arms["random"]["num_seeds"], arms["random"]["num_runs"]) == (2, 12)
    assert result["comparisons"][0]["num_seeds"] == 2


def test_rates_are_chosen_on_a_seed_of_their_own_and_recorded(tmp_path: Path) -> None:
    tune = {"learning_rate": [1e-3, 3e-3, 1e-2], "seed": 100, "task": "rules", "train": {"max_steps": 5}}
    config = make(tmp_path, tune=tune)
    runs = [cell for cell in expand(config) if cell.spec.rates]
    # Three rates for each of three trained (model, arm), once for both tasks.
    assert len(runs) == 9 and {cell.spec.seed for cell in runs} == {100}
    assert {cell.spec.task for cell in runs} == {"rules"} and all(cell.spec.train == {"max_steps": 5} for cell in runs)
    order: list[str] = []

    def cell(spec: CellSpec) -> dict[str, Any]:
        order.append("tuning" if spec.rates else "cell")
        if spec.rates == {"learning_rate": 3e-3} and spec.arm == "plain: attention":
            raise TrainingFailed("the loss is not finite")
        return synthetic.cheap_cell(spec)

    result = run(config, cell)
    assert result["status"] == "done" and order.count("tuning") == 9
    chosen = {(t["name"], t["rates"]["learning_rate"]) for t in result["tuned"]}
    # The lowest loss of those that did not diverge: |log(0.01 / 0.003)| > |log(0.001 / 0.003)|.
    assert chosen == {("granite: attention", 3e-3), ("granite: recurrent", 3e-3), ("plain: attention", 1e-3)}
    diverged = records.read_record(tmp_path / "tuning" / "plain-attention-rules-seed100-learning0.003.json.gz")
    assert diverged["validation_loss"] is None and diverged["error"] == "the loss is not finite"
    again: list[str] = []
    changed = make(tmp_path, tune={**tune, "learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]})

    def counting(spec: CellSpec) -> dict[str, Any]:
        again.append("tuning" if spec.rates else "cell")
        return synthetic.cheap_cell(spec)

    run(changed, counting)
    # One rate more: only its runs are new, and every cell whose choice could change is run again.
    assert (again.count("tuning"), again.count("cell")) == (3, 12)


def test_the_chosen_rate_is_trained_with(tmp_path: Path) -> None:
    spec = expand(make(tmp_path, train={"optimizer": {"learning_rate": 1.0, "weight_decay": 0.5}}))[-1].spec
    config = _train_config(spec, {"learning_rate": 3e-3})
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (3e-3, 0.5)
    assert math.isclose(_train_config(spec, {}).optimizer.learning_rate, 1.0)


def test_every_record_names_the_declaration_it_ran_under(tmp_path: Path) -> None:
    config = make(tmp_path)
    result = run(config)
    (path,) = tmp_path.glob("preregistration-*.json")
    digest = path.stem.removeprefix("preregistration-")
    assert {record["preregistration"] for record in study.read_cells(config)} == {digest}
    assert result["preregistrations"] == {digest: 18}
    assert study.preregister(make(tmp_path, workers=3, retries=5)) == digest, "how it is run is no part of it"
    value = json.loads(path.read_text())
    value["config"]["comparisons"] = []
    path.write_text(json.dumps(value))
    with pytest.raises(records.RecordError, match="changed after it was written"):
        run(config)


def test_an_estimate_counts_what_is_left_and_takes_its_time_from_done_cells(tmp_path: Path) -> None:
    config = make(tmp_path, workers=4)

    def cost(spec: CellSpec) -> Cost:
        return Cost(tokens=1000 if spec.recipe else 0, questions=10 * (1 + len(spec.transfer)))

    before = study.estimate_study(config, cost)
    # 6 bases answer 10 questions each, 12 trained cells 30.
    assert (before.num_cells, before.num_done, before.tokens, before.questions) == (18, 0, 12_000, 420)
    assert before.seconds is None and "time unknown" in before.text()
    cells = expand(config)
    chosen = calibration_cells(cells)
    # A base on each of three tasks and a trained cell on each of two, on each of two models.
    assert len(chosen) == 10
    serial = make(tmp_path, workers=0)
    study.run_study(serial, synthetic.cheap_cell, only=[cell.digest for cell in chosen], console=QUIET)
    for cell in chosen:
        record = records.read_record(cell.path)
        records.write_json(cell.path, {**record, "seconds": 60.0 if cell.spec.model_name == "granite" else 20.0})
    after = study.estimate_study(config, cost)
    assert (after.num_done, after.num_timed, after.tokens) == (10, 10, 8_000)
    # Left: 6 trained cells of granite and 2 of the plain model, on four workers.
    assert after.seconds == pytest.approx((6 * 60 + 2 * 20) / 4)
    assert "about 0:01:40 with 4 workers, from 10 timed cells" in after.text()
    run(serial)
    assert study.estimate_study(config, cost).text() == "18 cells, 18 done."


def test_a_cell_that_fails_is_tried_again_as_often_as_declared(tmp_path: Path) -> None:
    tried: list[str] = []

    def flaky(spec: CellSpec) -> dict[str, Any]:
        tried.append(spec.arm)
        if spec.arm == "granite: recurrent" and tried.count(spec.arm) < 12:
            raise OSError("the disk was away")
        if spec.arm == "plain: base":
            raise ConfigError("no such thing")
        return synthetic.cheap_cell(spec)

    result = run(make(tmp_path, retries=2), flaky)
    # Four cells, of which three fail three times each; the last attempts of the fourth succeed.
    assert tried.count("granite: recurrent") == 12
    assert tried.count("plain: base") == 3, "what an error of ours explains is not tried again"
    assert result["num_cells"] == {"expected": 18, "done": 12, "failed": 6}
    assert result["num_failed_attempts"] == 8
    later = run(make(tmp_path, retries=2))
    assert later["status"] == "done" and later["num_failed_attempts"] == 8 + 6
    kept = records.read_record(tmp_path / "cells" / "plain-base-rules-seed0.json.gz")
    assert [attempt["error"] for attempt in kept["failed_attempts"]] == ["no such thing"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "give exactly one of the two"),
        ({"models": {}}, "give exactly one of the two"),
        ({"models": {"a/b": "x"}}, "becomes a file name"),
        ({"cells": {"a": {"recipe": "all", "models": ["granit"]}}, "comparisons": []}, "nearest: 'granite'"),
        ({"transfer": [{"name": "rules", "size": "1.0", "primary": "exact"}]}, "differs from the task of that name"),
        ({"tune": {"learning_rate": [1e-3], "seed": 9}}, "two or more different values"),
        ({"tune": {"learning_rate": [1e-3, 1e-2], "seed": 1}}, "is also one of 'seeds'"),
        ({"tune": {"learning_rate": [1e-3, 1e-2], "seed": 9, "task": "rulez"}}, "nearest: 'rules'"),
        ({"cells": {"a": {"draws": [1]}}, "comparisons": []}, "expected different seeds of a recipe's placement"),
        ({"families": {"f": {"comparisons": []}}}, "at least one pair"),
        ({"families": {"f": {"comparisons": [["attention", "base"]], "on": ["rulez"]}}}, "nearest: 'rules'"),
        ({"families": {"f": {"comparisons": [["atention", "base"]]}}}, "nearest: 'attention'"),
        ({"families": {"declared": {"comparisons": [["attention", "base"]]}}}, "another name"),
        ({"models": {"a": "x", "b": "x"}}, "field 'models'"),
        ({"data_orders": [1, 1]}, "expected no entry twice"),
    ],
)
def test_bad_axes_name_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **changes)
