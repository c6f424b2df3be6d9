"""Made-up but realistic records (base, V1, V2, V4; three tasks, five seeds) for tests and for looking at the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ssmtune import records, stats

TASKS = {"classification": "exact", "mapping": "accuracy", "rules": "all_fields"}
SEEDS = (0, 1, 2, 3, 4)
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "versions": {"ssmtune": "0.1.0", "torch": "2.9.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "device": "NVIDIA GPU",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
}
NUM_LAYERS, ATTENTION_LAYERS = 12, (5, 11)
QUALITY = {
    "base": (0.02, 0.01, 0.0),
    "V1": (0.11, 0.22, 0.31),
    "V2": (0.52, 0.93, 0.90),
    "V4": (0.58, 0.935, 0.905),
}
TOTAL = 8_393_216


def _record(kind: str, *, config: dict[str, Any], status: str = "done", **facts: Any) -> dict[str, Any]:
    created = "2026-11-20T10:00:00+00:00"
    head = {"kind": kind, "created": created, "status": status, "config": config, "environment": ENVIRONMENT}
    return {**head, **facts}


def plan(arm: str) -> dict[str, Any]:
    """The plan part of a train record: V1 adapts attention only, V2 everything, V4 also the core."""
    coverage = []
    for layer in range(NUM_LAYERS):
        attention = layer in ATTENTION_LAYERS
        mixer, sites = ("attention", 4) if attention else ("recurrent", 2)
        coverage.append(
            {"layer": layer, "group": mixer, "sites": sites, "adapted": sites if attention or arm != "V1" else 0}
        )
        coverage.append({"layer": layer, "group": "mlp", "sites": 2, "adapted": 0 if arm == "V1" else 2})
        if not attention:
            coverage.append({"layer": layer, "group": "core", "sites": 3, "adapted": 3 if arm == "V4" else 0})
    groups = {"attention": 16_384}
    if arm != "V1":
        groups |= {"recurrent": 143_360, "mlp": 196_608}
    if arm == "V4":
        groups |= {"core": 240}
    return {"total": TOTAL, "trainable": sum(groups.values()), "groups": groups, "coverage": coverage}


def core_rows(generator: np.random.Generator) -> list[dict[str, Any]]:
    """Movement of A_log, D and dt_bias in every recurrent layer."""
    rows = []
    for layer in range(NUM_LAYERS):
        if layer in ATTENTION_LAYERS:
            continue
        before = float(20 * math.exp(generator.normal(0, 0.5)))
        for tensor, survives in (("A_log", 0.45), ("D", 0.7), ("dt_bias", 0.03)):
            mean = float(2e-3 * math.exp(generator.normal(0, 0.4)))
            rows.append(
                {
                    "layer": layer,
                    "tensor": tensor,
                    "num": 8,
                    "moved": 1.0,
                    "mean_abs_delta": mean,
                    "max_abs_delta": 4 * mean,
                    "survives_bf16": float(np.clip(survives + generator.normal(0, 0.05), 0, 1)),
                    "horizon_before": before,
                    "horizon_after": before * 1.06,
                }
            )
    return rows


def train_record(arm: str, task: str, seed: int, *, num_steps: int = 300) -> dict[str, Any]:
    """A train record of one arm, task and seed."""
    generator = np.random.default_rng([seed, len(arm), len(task), ord(arm[-1])])
    floor = {"V1": 1.1, "V2": 0.62, "V4": 0.585}[arm] * (1 + 0.02 * generator.standard_normal())
    steps = range(5, num_steps + 1, 5)
    loss = [floor + 1.9 * math.exp(-s / 40) + 0.06 * generator.standard_normal() for s in steps]
    evals = [(s, floor + 0.05 + 1.9 * math.exp(-s / 38)) for s in range(25, num_steps + 1, 25)]
    checks = [
        {"name": "coverage", "ok": True, "measured": 0, "limit": 0, "where": None},
        {"name": "live", "ok": True, "measured": 3.1e-4, "limit": 0.0, "where": None},
        {"name": "paths_agree", "ok": True, "measured": 2.4e-6 * (1 + seed), "limit": 1e-4, "where": "prefill"},
        {"name": "frozen", "ok": True, "measured": 0, "limit": 0, "where": None},
        {"name": "merge", "ok": True, "measured": 1.2e-6, "limit": 1e-4, "where": None},
    ]
    survives = not (arm == "V4" and seed == 3)
    where = None if survives else "model.layers.3.mamba.dt_bias"
    checks.append({"name": "survives_export", "ok": survives, "measured": 0.031, "limit": 0.0, "where": where})
    return _record(
        "train",
        config={"model": "tiny-granite-h", "recipe": arm, "data": {"task": task, "size": 1.0}, "seed": seed},
        run_id=f"run-{arm}-{task}-{seed}",
        name=arm,
        plan=plan(arm),
        history=[
            {
                "step": s,
                "loss": value,
                "lr": 1e-3 * (1 - s / num_steps),
                "grad_norm": {"lora": 0.3, **({"core": 1.2} if arm == "V4" else {})},
                "tokens_per_s": 91_000.0,
            }
            for s, value in zip(steps, loss, strict=True)
        ],
        eval_history=[{"step": s, "eval_loss": value} for s, value in evals],
        core=core_rows(generator) if arm == "V4" else [],
        seconds=212.4 + seed,
        peak_memory_bytes=3_221_225_472,
        restored_step=num_steps,
        verify={"ok": survives, "checks": checks},
    )


def evaluate_record(arm: str, task: str, seed: int, *, num_examples: int = 300, markup: bool = True) -> dict[str, Any]:
    """An evaluate record; some completions hold HTML when `markup`."""
    index = list(TASKS).index(task)
    # Difficulty belongs to the example, so that arms and seeds are truly paired.
    difficulty = np.random.default_rng(index).normal(0, 1.2, num_examples)
    generator = np.random.default_rng([seed, index, len(arm), ord(arm[-1])])
    share = min(max(QUALITY[arm][index], 1e-4), 1 - 1e-4)
    shift = math.log(share / (1 - share)) * 1.35 + 0.12 * generator.standard_normal()
    right = generator.random(num_examples) < 1 / (1 + np.exp(difficulty - shift))
    ids = [f"{task}-{i:04d}" for i in range(num_examples)]
    formatted = np.where(right, 1.0, generator.random(num_examples) < 0.9)
    label = "<b>network scan</b> & <script>alert(1)</script>" if markup else "network scan"
    samples = [
        {
            "id": ids[i],
            "prompt": f"Classify the event.\nsrc=10.0.0.{i} dst=10.0.1.9 port={1000 + i} action=deny\nAnswer:",
            "expected": "category: network scan\nseverity: 3",
            "completion": f"category: {label}\nseverity: 3" if right[i] else "category: login failure\nseverity: 5",
            "scores": {TASKS[task]: float(right[i])},
        }
        for i in range(12)
    ]
    metrics = {TASKS[task]: right, "format": formatted}
    return _record(
        "evaluate",
        config={"model": "tiny-granite-h", "task": task, "size": "full", "seed": seed},
        name=arm,
        seed=seed,
        task=task,
        primary=TASKS[task],
        metrics={name: float(np.mean(values)) for name, values in metrics.items()},
        example_ids=ids,
        scores={name: [float(v) for v in values] for name, values in metrics.items()},
        samples=samples,
        stopped_rate=0.98,
        seconds=31.5,
    )


def run_records(
    *, arms: tuple[str, ...] = ("base", "V1", "V2", "V4"), seeds: tuple[int, ...] = SEEDS, num_examples: int = 300
) -> list[dict[str, Any]]:
    """Train and evaluate records of the whole study; the base is evaluated at the first seed only."""
    made = []
    for task in TASKS:
        for arm in arms:
            for seed in seeds if arm != "base" else seeds[:1]:
                if arm != "base":
                    made.append(train_record(arm, task, seed))
                made.append(evaluate_record(arm, task, seed, num_examples=num_examples))
    return made


def study_mapping(output_dir: str, **changes: Any) -> dict[str, Any]:
    """The contents of a study.yaml for the synthetic arms."""
    return {
        "name": "granite-controls",
        "model": "tiny-granite-h",
        "tasks": [{"name": task, "size": "full", "primary": primary} for task, primary in TASKS.items()],
        "seeds": list(SEEDS),
        "cells": {
            "base": {},
            "V1": {"recipe": "transformer-names"},
            "V2": {"recipe": "all"},
            "V4": {"recipe": "all+core", "train": {"core_learning_rate": 1e-3}},
        },
        "comparisons": [["V1", "base"], ["V2", "V1"], ["V4", "V2"]],
        "train": {"num_steps": 300},
        "num_examples": 300,
        "output_dir": output_dir,
        "workers": 0,
        **changes,
    }


def fake_cell(spec: Any) -> dict[str, Any]:
    """Stands in for training and evaluating one cell of `study_mapping`."""
    trained = train_record(spec.cell, spec.task, spec.seed) if spec.recipe else None
    return {"train": trained, "evaluate": evaluate_record(spec.cell, spec.task, spec.seed)}


FULL_MODELS = {"granite": "tiny-granite-h", "falcon": "zoo/tiny-falcon-h1"}
FULL_TASKS, FULL_TRANSFER = ("classification", "mapping"), ("mapping", "rules")
FULL_SEEDS, DRAWS = (0, 1, 2), (1, 2, 3, 4)
FULL_CELLS: dict[str, dict[str, Any]] = {
    "base": {},
    "shown": {"shots": 4},
    "attention": {"recipe": "attention"},
    "all.core": {"recipe": "all+core"},
    "without": {"reuse": "all.core"},
    "random": {"recipe": "random", "draws": list(DRAWS)},
}
FULL_QUALITY = {"base": 0.2, "shown": 0.45, "attention": 0.66, "all.core": 0.83, "without": 0.82, "random": 0.64}
FULL_FAMILIES = {
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
    config = _full_config(num_examples)
    registration = {
        "kind": "preregistration",
        "created": "2026-11-20T08:00:00+00:00",
        "digest": records.digest(config),
        "config": config,
        "num_comparisons": len(_full_comparisons()),
        "families": {name: {"num_comparisons": 0, "minimum_detectable_effect": 0.06} for name in FULL_FAMILIES},
        "minimum_detectable_effect": 0.06,
    }
    cells = [_full_cell(*axes, str(registration["digest"]), num_examples) for axes in _full_axes()]
    return [registration, *cells, _full_record(cells, config, str(registration["digest"]))]


def _full_config(num_examples: int) -> dict[str, Any]:
    tasks = {name: {"name": name, "size": "0.1", "primary": primary} for name, primary in TASKS.items()}
    return {
        "name": "placement",
        "models": FULL_MODELS,
        "model": None,
        "tasks": [tasks[name] for name in FULL_TASKS],
        "transfer": [tasks[name] for name in FULL_TRANSFER],
        "seeds": list(FULL_SEEDS),
        "data_orders": [],
        "cells": {name: {"recipe": None, "reuse": None, "draws": [], **cell} for name, cell in FULL_CELLS.items()},
        "tune": {"learning_rate": [1e-3, 3e-3], "seed": 100, "on": "validation", "task": None},
        "num_examples": num_examples,
    }


def _full_axes() -> list[tuple[str, str, str, int, int | None]]:
    """(model, cell, task, seed, draw): a base on every task that anything is evaluated on; one cell never ran."""
    made: list[tuple[str, str, str, int, int | None]] = []
    for model in FULL_MODELS:
        for name, cell in FULL_CELLS.items():
            untrained = not {"recipe", "reuse"} & set(cell)
            for task in TASKS if untrained else FULL_TASKS:
                for seed in FULL_SEEDS[:1] if untrained else FULL_SEEDS:
                    made += [(model, name, task, seed, draw) for draw in cell.get("draws", [None])]
    return [axes for axes in made if axes != ("falcon", "attention", "mapping", 2, None)]


def _full_cell(
    model: str, name: str, task: str, seed: int, draw: int | None, registration: str, num_examples: int
) -> dict[str, Any]:
    cell = FULL_CELLS[name]
    trained = {"recipe", "reuse"} & set(cell)
    others = [t for t in FULL_TRANSFER if t != task] if trained else []
    config = {
        "cell": name,
        "model": FULL_MODELS[model],
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
        return _record("study_cell", config=config, status="failed", **{**facts, "error": error})
    rates = {"learning_rate": 3e-3 if name == "attention" else 1e-3} if "recipe" in cell else {}
    run = None
    if "recipe" in cell:
        run = train_record("V4" if name == "all.core" else "V2", task, seed)
        run |= {"name": name, "run_id": f"{model}-{name}-{task}-{seed}-{draw}"}
        if (model, name, task, seed) == UNSOUND:
            fault = {"ok": False, "where": "model.layers.3.mamba.dt_bias"}
            checks = [{**c, **fault} if c["name"] == "survives_export" else c for c in run["verify"]["checks"]]
            run["verify"] = {"ok": False, "checks": checks}
        run["config"] = {**run["config"], "model": FULL_MODELS[model], "optimizer": rates, "num_epochs": 3.0}
    evaluations = [_full_evaluation(config, tested, num_examples) for tested in (task, *others)]
    status = "provisional" if run is not None and not run["verify"]["ok"] else "done"
    outcome = {"train": run, "evaluate": evaluations[0], "transfer": evaluations[1:], "tuned": rates}
    if status == "provisional":
        facts["error"] = "a stage ended as provisional"
    return _record("study_cell", config=config, status=status, **facts, **outcome)


def _full_evaluation(config: dict[str, Any], tested: str, num_examples: int) -> dict[str, Any]:
    """Scores of one cell on one task: what was not trained on falls below the base, more so with the core."""
    name, model, seed = str(config["cell"]), str(config["model_name"]), int(config["seed"])
    share = FULL_QUALITY[name]
    if tested != config["task"]:
        share = {"attention": 0.2, "all.core": 0.07, "without": 0.09, "random": 0.18}[name]
    number = list(TASKS).index(tested)
    difficulty = np.random.default_rng(number).normal(0, 1.2, num_examples)
    generator = np.random.default_rng([seed, number, list(FULL_MODELS).index(model), len(name), config["draw"] or 0])
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


def _full_comparisons() -> list[tuple[str, str, str, str, str, str]]:
    """(family, model, trained on, evaluated on, arm, baseline)."""
    made = []
    for family, pairs in FULL_FAMILIES.items():
        for model in FULL_MODELS:
            for task in FULL_TASKS:
                for tested in [t for t in FULL_TRANSFER if t != task] if family == "kept" else [task]:
                    made += [(family, model, task, tested, arm, baseline) for arm, baseline in pairs]
    return made


def _full_record(cells: list[dict[str, Any]], config: dict[str, Any], registration: str) -> dict[str, Any]:
    found: dict[tuple[str, str, str, str], list[tuple[int, int | None, dict[str, Any]]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            spec = cell["config"]
            trained_on = spec["task"] if spec["recipe"] or spec["reuse"] else ""
            for one in (cell["evaluate"], *cell["transfer"]):
                key = (spec["model_name"], spec["cell"], trained_on, one["task"])
                found.setdefault(key, []).append((spec["seed"], spec["draw"], one))
    comparisons = []
    for family in FULL_FAMILIES:
        made = [_compared(found, *axes) for axes in _full_comparisons() if axes[0] == family]
        for c, p in zip(made, stats.holm([c["p"] for c in made]), strict=True):
            inside = c["low"] <= 0 <= c["high"] or p > 0.05
            verdict = "no difference" if inside else ("higher" if c["difference"] > 0 else "lower")
            comparisons.append({**c, "p_holm": p, "verdict": verdict})
    statuses = [cell["status"] for cell in cells]
    panels = [(m, t, e) for m in FULL_MODELS for t in FULL_TASKS for e in (t, *FULL_TRANSFER) if e != t or e is t]
    panels = list(dict.fromkeys(panels))
    sizes = {name: sum(c["family"] == name for c in comparisons) for name in FULL_FAMILIES}
    return _record(
        "study",
        config=config,
        status="provisional",
        name="placement",
        arms=[f"{model}: {name}" for model in FULL_MODELS for name in FULL_CELLS],
        tasks=[_full_table(found, *panel) for panel in panels],
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
    sides = [found[model, n, task if {"recipe", "reuse"} & set(FULL_CELLS[n]) else "", tested] for n in (arm, baseline)]
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


def _full_table(found: Any, model: str, task: str, tested: str) -> dict[str, Any]:
    arms = []
    for name, cell in FULL_CELLS.items():
        runs = found.get((model, name, task if {"recipe", "reuse"} & set(cell) else "", tested), [])
        if runs:
            seeds = sorted({s for s, _, _ in runs})
            values = [float(np.mean([e["metrics"][TASKS[tested]] for s, _, e in runs if s == seed])) for seed in seeds]
            interval = stats.mean_interval(values)
            metrics = {TASKS[tested]: {**interval.to_dict(), "over": "seeds", "values": values}}
            arms.append({"name": name, "num_seeds": len(values), "num_runs": len(runs), "metrics": metrics})
    facts = {"model": model, "trained_on": task, "evaluated_on": tested, "size": "0.1", "primary": TASKS[tested]}
    return {"task": _panel_name(model, task, tested), **facts, "arms": arms}
