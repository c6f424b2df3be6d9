"""Made-up records of a study that uses everything that a study can declare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from synthetic_records import ENVIRONMENT, TASKS, evaluate_record, train_record

from ssmtune import records, stats

MODELS = {"granite": "tiny-granite-h", "falcon": "zoo/tiny-falcon-h1"}
TRAINED, TRANSFER = ("classification", "mapping"), ("mapping", "rules")
SEEDS, DRAWS = (0, 1, 2), (1, 2, 3, 4)
CELLS: dict[str, dict[str, Any]] = {
    "base": {},
    "shown": {"shots": 4},
    "attention": {"recipe": "attention"},
    "all.core": {"recipe": "all+core"},
    "without": {"reuse": "all.core"},
    "random": {"recipe": "random", "draws": list(DRAWS)},
}
QUALITY = {"base": 0.2, "shown": 0.45, "attention": 0.66, "all.core": 0.83, "without": 0.82, "random": 0.64}
FAMILIES = {
    "placement": [("attention", "base"), ("all.core", "attention"), ("attention", "random"), ("all.core", "random")],
    "core": [("all.core", "without")],
    "kept": [("all.core", "base"), ("all.core", "shown")],
}
UNSOUND = ("granite", "all.core", "classification", 1)
"""The cell whose verify fails, so that it is provisional."""
FAILED = ("falcon", "all.core", "mapping", 2)
"""The cell that runs out of memory; the one that reuses its run fails with it."""


def full_study(*, num_examples: int = 120) -> list[dict[str, Any]]:
    """Cells, pre-registration and study record of a study that uses everything a study can declare.

    Two base models, transfer, placements drawn at random, a base that is shown solved examples, tuned rates, two cells
    that failed and one that never ran.
    """
    config = _config(num_examples)
    registration = {
        "kind": "preregistration",
        "created": "2026-11-20T08:00:00+00:00",
        "digest": records.digest(config),
        "config": config,
        "num_comparisons": len(_comparisons()),
        "families": {name: {"num_comparisons": 0, "minimum_detectable_effect": 0.06} for name in FAMILIES},
        "minimum_detectable_effect": 0.06,
    }
    cells = [_cell(*axes, str(registration["digest"]), num_examples) for axes in _axes()]
    return [registration, *cells, *_tuning(), _record(cells, config, str(registration["digest"]))]


def _tuning() -> list[dict[str, Any]]:
    """The rates tried for one arm; at the last one training diverged."""
    facts = {"name": "granite: attention", "task": "mapping", "seed": 100}
    return [
        _recorded("study_tuning", {**facts}, "done", **facts, rates={"learning_rate": rate}, validation_loss=loss)
        for rate, loss in ((1e-3, 0.7), (3e-3, 0.5), (1e-1, None))
    ]


def _recorded(kind: str, config: dict[str, Any], status: str, **facts: Any) -> dict[str, Any]:
    created = "2026-11-20T10:00:00+00:00"
    head = {"kind": kind, "created": created, "status": status, "config": config, "environment": ENVIRONMENT}
    return {**head, **facts}


def _config(num_examples: int) -> dict[str, Any]:
    tasks = {name: {"name": name, "size": "0.1", "primary": primary} for name, primary in TASKS.items()}
    return {
        "name": "placement",
        "models": MODELS,
        "model": None,
        "tasks": [tasks[name] for name in TRAINED],
        "transfer": [tasks[name] for name in TRANSFER],
        "seeds": list(SEEDS),
        "data_orders": [],
        "cells": {name: {"recipe": None, "reuse": None, "draws": [], **cell} for name, cell in CELLS.items()},
        "tune": {"learning_rate": [1e-3, 3e-3], "seed": 100, "on": "validation", "task": None},
        "num_examples": num_examples,
    }


def _axes() -> list[tuple[str, str, str, int, int | None]]:
    """(model, cell, task, seed, draw): a base on every task that anything is evaluated on; one cell never ran."""
    made: list[tuple[str, str, str, int, int | None]] = []
    for model in MODELS:
        for name, cell in CELLS.items():
            untrained = not {"recipe", "reuse"} & set(cell)
            for task in TASKS if untrained else TRAINED:
                for seed in SEEDS[:1] if untrained else SEEDS:
                    made += [(model, name, task, seed, draw) for draw in cell.get("draws", [None])]
    return [axes for axes in made if axes != ("falcon", "attention", "mapping", 2, None)]


def _cell(
    model: str, name: str, task: str, seed: int, draw: int | None, registration: str, num_examples: int
) -> dict[str, Any]:
    cell = CELLS[name]
    trained = {"recipe", "reuse"} & set(cell)
    others = [t for t in TRANSFER if t != task] if trained else []
    config = {
        "cell": name,
        "model": MODELS[model],
        "model_name": model,
        "task": task,
        "seed": seed,
        "recipe": cell.get("recipe"),
        "reuse": cell.get("reuse"),
        "draw": draw,
        "data_order": None,
        "shots": cell.get("shots", 0),
    }
    facts: dict[str, Any] = {"name": f"{model}: {name}", "model": model, "task": task, "seed": seed, "draw": draw}
    facts |= {"preregistration": registration, "failed_attempts": [], "error": None, "digest": records.digest(config)}
    if (model, task, seed) == (FAILED[0], *FAILED[2:]) and name in (FAILED[1], "without"):
        error = "OutOfMemoryError: tried to allocate 2 GiB" if name == FAILED[1] else "a cell that it needs failed"
        return _recorded("study_cell", config, "failed", **{**facts, "error": error})
    rates = {"learning_rate": 3e-3 if name == "attention" else 1e-3} if "recipe" in cell else {}
    run = None
    if "recipe" in cell:
        run = train_record("V4" if name == "all.core" else "V2", task, seed)
        run |= {"name": name, "run_id": f"{model}-{name}-{task}-{seed}-{draw}"}
        if (model, name, task, seed) == UNSOUND:
            fault = {"ok": False, "where": "model.layers.3.mamba.dt_bias"}
            checks = [{**c, **fault} if c["name"] == "survives_export" else c for c in run["verify"]["checks"]]
            run["verify"] = {"ok": False, "checks": checks}
        run["config"] = {**run["config"], "model": MODELS[model], "optimizer": rates, "num_epochs": 3.0}
    evaluations = [_evaluation(config, tested, num_examples) for tested in (task, *others)]
    status = "provisional" if run is not None and not run["verify"]["ok"] else "done"
    outcome = {"train": run, "evaluate": evaluations[0], "transfer": evaluations[1:], "tuned": rates}
    if status == "provisional":
        facts["error"] = "a stage ended as provisional"
    return _recorded("study_cell", config, status, **facts, **outcome)


def _evaluation(config: dict[str, Any], tested: str, num_examples: int) -> dict[str, Any]:
    """Scores of one cell on one task: what was not trained on falls below the base, more so with the core."""
    name, model, seed = str(config["cell"]), str(config["model_name"]), int(config["seed"])
    share = QUALITY[name]
    if tested != config["task"]:
        share = {"attention": 0.2, "all.core": 0.07, "without": 0.09, "random": 0.18}[name]
    number = list(TASKS).index(tested)
    difficulty = np.random.default_rng(number).normal(0, 1.2, num_examples)
    generator = np.random.default_rng([seed, number, list(MODELS).index(model), len(name), config["draw"] or 0])
    shift = math.log(share / (1 - share)) * 1.35 + 0.1 * generator.standard_normal() + 0.1 * (config["draw"] or 0)
    right = generator.random(num_examples) < 1 / (1 + np.exp(difficulty - shift))
    record = evaluate_record("V2", tested, seed, num_examples=num_examples)
    record["config"] = {"model": config["model"], "task": tested, "seed": seed, "shots": config["shots"]}
    record["config"]["adapter"] = f"runs/{model}-{name}-{config['task']}-seed{seed}/adapter"
    for index, sample in enumerate(record["samples"]):
        sample["completion"] = sample["expected"] if right[index] else f"category: guess {index} of {name}"
        sample["scores"] = {TASKS[tested]: float(right[index])}
    scores = [float(v) for v in right]
    metrics = {TASKS[tested]: float(np.mean(right))}
    return {**record, "name": f"{model}: {name}", "metrics": metrics, "scores": {TASKS[tested]: scores}}


def _comparisons() -> list[tuple[str, str, str, str, str, str]]:
    """(family, model, trained on, evaluated on, arm, baseline)."""
    made = []
    for family, pairs in FAMILIES.items():
        for model in MODELS:
            for task in TRAINED:
                for tested in [t for t in TRANSFER if t != task] if family == "kept" else [task]:
                    made += [(family, model, task, tested, arm, baseline) for arm, baseline in pairs]
    return made


def _record(cells: list[dict[str, Any]], config: dict[str, Any], registration: str) -> dict[str, Any]:
    found: dict[tuple[str, str, str, str], list[tuple[int, int | None, dict[str, Any]]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            spec = cell["config"]
            trained_on = spec["task"] if spec["recipe"] or spec["reuse"] else ""
            for one in (cell["evaluate"], *cell["transfer"]):
                key = (spec["model_name"], spec["cell"], trained_on, one["task"])
                found.setdefault(key, []).append((spec["seed"], spec["draw"], one))
    comparisons = []
    for family in FAMILIES:
        made = [_compared(found, *axes) for axes in _comparisons() if axes[0] == family]
        for c, p in zip(made, stats.holm([c["p"] for c in made]), strict=True):
            inside = c["low"] <= 0 <= c["high"] or p > 0.05
            verdict = "no difference" if inside else ("higher" if c["difference"] > 0 else "lower")
            comparisons.append({**c, "p_holm": p, "verdict": verdict})
    statuses = [cell["status"] for cell in cells]
    panels = [(m, t, e) for m in MODELS for t in TRAINED for e in (t, *TRANSFER) if e != t or e is t]
    panels = list(dict.fromkeys(panels))
    sizes = {name: sum(c["family"] == name for c in comparisons) for name in FAMILIES}
    return _recorded(
        "study",
        config,
        "provisional",
        name="placement",
        arms=[f"{model}: {name}" for model in MODELS for name in CELLS],
        tasks=[_table(found, *panel) for panel in panels],
        comparisons=comparisons,
        num_comparisons=len(comparisons),
        families=[
            {"name": n, "num_comparisons": k, "on": "trained", "margin": 0.05 if n == "core" else None}
            for n, k in sizes.items()
        ],
        minimum_detectable_effect=[
            {"arm": c["arm"], "baseline": c["baseline"], "task": c["task"], "effect": 2.8 * c["standard_error"]}
            for c in comparisons
        ],
        tuned=[
            {"name": cell["name"], "task": cell["task"], "rates": cell["tuned"], "seed": cell["seed"]}
            for cell in cells
            if cell.get("tuned")
        ],
        method=stats.METHOD,
        preregistrations={registration: len(cells)},
        num_cells={"expected": len(cells) + 1, **{s: statuses.count(s) for s in sorted(set(statuses))}},
        num_failed_attempts=1,
        missing=["falcon-attention-mapping-seed2.json.gz"],
        failures=[
            {k: cell[k] for k in ("name", "task", "seed", "status", "error")}
            for cell in cells
            if cell["status"] != "done"
        ],
        mixed_code=[],
    )


def _panel_name(model: str, task: str, tested: str) -> str:
    return f"{model}: {tested if task == tested else f'{task} -> {tested}'}"


def _compared(found: Any, family: str, model: str, task: str, tested: str, arm: str, baseline: str) -> dict[str, Any]:
    sides = [found[model, n, task if {"recipe", "reuse"} & set(CELLS[n]) else "", tested] for n in (arm, baseline)]
    common = set.intersection(*({seed for seed, _, _ in side} for side in sides if len(side) > 1))
    arrays, draws = [], [0.0]
    for side in sides:
        by_seed = {s: [e["scores"][TASKS[tested]] for seed, _, e in side if seed == s] for s in sorted(common)}
        single = [e["scores"][TASKS[tested]] for _, _, e in side]
        arrays.append(single if len(side) == 1 else [np.mean(by_seed[s], axis=0) for s in sorted(common)])
        if len({draw for _, draw, _ in side}) > 1:
            draws = [float(np.mean([e["scores"][TASKS[tested]] for _, d, e in side if d == draw])) for draw in DRAWS]
    result = stats.paired_difference(np.asarray(arrays[0]), np.asarray(arrays[1]), seed=0)
    panel = _panel_name(model, task, tested)
    flat = stats.Comparison(arm=arm, baseline=baseline, task=panel, metric=TASKS[tested], result=result).to_dict()
    null: dict[str, Any] = {"num_draws": 1, "sd_draw": 0.0, "is_null": False}
    if len(draws) > 1:
        null = {"num_draws": len(draws), "sd_draw": float(np.std(draws, ddof=1)), "is_null": True}
    at_most = max(abs(result.low), abs(result.high))
    margin = 0.05 if family == "core" else None
    facts = {"family": family, "model": model, "trained_on": task, "evaluated_on": tested, "margin": margin}
    return {
        **flat,
        **facts,
        **null,
        "no_larger_than": at_most,
        "equivalent": None if margin is None else at_most < margin,
    }


def _table(found: Any, model: str, task: str, tested: str) -> dict[str, Any]:
    arms = []
    for name, cell in CELLS.items():
        runs = found.get((model, name, task if {"recipe", "reuse"} & set(cell) else "", tested), [])
        if runs:
            seeds = sorted({s for s, _, _ in runs})
            values = [float(np.mean([e["metrics"][TASKS[tested]] for s, _, e in runs if s == seed])) for seed in seeds]
            interval = stats.mean_interval(values)
            metrics = {TASKS[tested]: {**interval.to_dict(), "over": "seeds", "values": values}}
            arms.append({"name": name, "num_seeds": len(values), "num_runs": len(runs), "metrics": metrics})
    facts = {"model": model, "trained_on": task, "evaluated_on": tested, "size": "0.1", "primary": TASKS[tested]}
    return {"task": _panel_name(model, task, tested), **facts, "arms": arms}
