"""Made-up but realistic records (base, V1, V2, V4; three tasks, five seeds) for tests and for looking at the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

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
