"""Studies: declared cells run over tasks and seeds, each kept as a record, compared only as declared in advance."""

from __future__ import annotations

import contextlib
import functools
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import rich.console
import rich.progress

from ssmtune import records, stats, workers
from ssmtune.errors import RecordError, SsmtuneError, nearest
from ssmtune.study_cells import Cell, CellSpec, StudyCell, StudyConfig, StudyTask, expand

__all__ = [
    "Cell",
    "CellSpec",
    "RunCell",
    "StudyCell",
    "StudyConfig",
    "StudyTask",
    "analyse",
    "expand",
    "metric_interval",
    "preregister",
    "read_cells",
    "run_study",
    "score_array",
]

ASSUMED_SD = 0.45
"""Paired spread of a 0/1 score per example, assumed before the first run to state the smallest effect resolved."""


RunCell = Callable[[CellSpec], Mapping[str, Any]]
"""Returns {"train": train record or None, "evaluate": evaluate record}; raises when the cell fails."""


def run_study(
    config: StudyConfig,
    run_cell: RunCell,
    *,
    devices: Sequence[str] = (),
    inputs: Mapping[str, str] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Run every cell that has no done record of the same digest; return and write the study record.

    Writes a pre-registration first, then one record per cell, failed ones included; a later call retries those.
    Worker k sees only `devices[k % len(devices)]`. A worker that dies fails its own cell only.
    On Ctrl-C finished cells stay done and running ones are stopped.
    """
    cells = expand(config, inputs=inputs)
    preregister(config, inputs=inputs)
    found = {
        cell.digest: record for cell in cells if (record := _existing(cell)) is not None and record["status"] == "done"
    }
    jobs = [workers.Job(key=cell.digest, argument=cell, needs=cell.needs) for cell in cells if cell.digest not in found]
    call = functools.partial(_execute, run_cell)
    with (
        _progress(console) as progress,
        contextlib.closing(
            workers.run_jobs(
                jobs, call, workers=config.workers, devices=devices, done=frozenset(found), succeeded=_is_usable
            )
        ) as ended,
    ):
        at_once = min(len(jobs), max(1, config.workers))
        bar = progress.add_task(config.name, total=len(cells), completed=len(found), failed=0, running=at_once)
        for job, outcome in ended:
            record = found[job.key] = _outcome(job.argument, outcome)
            failed = sum(r["status"] == "failed" for r in found.values())
            progress.update(bar, completed=len(found), failed=failed, running=outcome.num_running)
            if record["error"]:
                progress.console.print(
                    f"{record['status']}: {job.argument.path.name}: {record['error']}", style="red", markup=False
                )
    study = analyse(list(found.values()), config, inputs=inputs)
    records.write_json(Path(config.output_dir) / "study.json.gz", study)
    return study


def preregister(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> Path:
    """Write config, outcomes and number of comparisons to `preregistration-<digest>.json`, unless it exists."""
    plain = pydantic.TypeAdapter(StudyConfig).dump_python(config, mode="json")
    digest = records.digest({"config": plain, "inputs": dict(inputs or {})})
    path = Path(config.output_dir) / f"preregistration-{digest}.json"
    if path.exists():
        return path
    num = len(config.comparisons) * len(config.tasks)
    resolvable = None
    if config.num_examples and num:
        resolvable = stats.minimum_detectable_effect(
            num_seeds=len(config.seeds), num_examples=config.num_examples, sd_noise=ASSUMED_SD, num_comparisons=num
        )
    value = {
        "kind": "preregistration",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "digest": digest,
        "config": plain,
        "inputs": dict(inputs or {}),
        "num_cells": len(expand(config, inputs=inputs)),
        "num_comparisons": num,
        "primary_outcomes": {task.name: task.primary for task in config.tasks},
        "method": stats.METHOD,
        "assumed_sd": ASSUMED_SD,
        "minimum_detectable_effect": resolvable,
    }
    return records.write_json(path, value)


def read_cells(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the cell records whose digest matches the config; missing, unreadable and older ones are left out."""
    return [record for cell in expand(config, inputs=inputs) if (record := _existing(cell)) is not None]


def _existing(cell: Cell) -> dict[str, Any] | None:
    try:
        record = records.read_record(cell.path, kind="study_cell")
    except (RecordError, zlib.error):
        return None
    return record if record.get("digest") == cell.digest else None


def _execute(run_cell: RunCell, cell: Cell) -> dict[str, Any]:
    """Run one cell where it was sent and return its record; made there, so that it names the device that was used."""
    result = run_cell(cell.spec)
    train, evaluation = result.get("train"), result["evaluate"]
    statuses = [record["status"] for record in (train, evaluation) if record is not None]
    worst = next((status for status in ("failed", "aborted", "provisional") if status in statuses), "done")
    return _record(
        cell, worst, train=train, evaluate=evaluation, error=None if worst == "done" else f"a stage ended as {worst}"
    )


def _is_usable(record: dict[str, Any]) -> bool:
    return record["status"] in ("done", "provisional")


def _record(cell: Cell, status: Any, **facts: Any) -> dict[str, Any]:
    spec = cell.spec
    names = {"name": spec.cell, "task": spec.task, "seed": spec.seed, "digest": cell.digest}
    return records.new_record("study_cell", config=asdict(spec), status=status, **names, **facts)


def _outcome(cell: Cell, outcome: workers.Outcome[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a cell that ended, and write it."""
    error = outcome.error
    if outcome.value is not None:
        record = outcome.value
    elif error is None:
        record = _record(cell, "failed", error=f"cell {cell.spec.reuse!r}, whose run it reuses, failed")
    elif isinstance(error, BrokenProcessPool):
        record = _record(cell, "failed", error="the worker process died (killed, or out of memory)")
    else:
        message = str(error) if isinstance(error, SsmtuneError) else f"{type(error).__name__}: {error}"
        record = _record(cell, "failed", error=message, traceback="".join(traceback.format_exception(error)))
    records.write_json(cell.path, record)
    return record


def _progress(console: rich.console.Console | None) -> rich.progress.Progress:
    columns = ("[bold]{task.description}", "{task.completed}/{task.total} ended, {task.fields[failed]} failed, ")
    return rich.progress.Progress(
        rich.progress.TextColumn(columns[0]),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(columns[1] + "{task.fields[running]} running"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left:"),
        rich.progress.TimeRemainingColumn(),
        console=console or rich.console.Console(stderr=True),
    )


def analyse(
    cells: Sequence[Mapping[str, Any]], config: StudyConfig, *, inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the study record: arms with intervals, declared comparisons, failures. Only done records enter a figure.

    Records of another digest than the config expands to are ignored, so cells of an earlier config never mix in.
    """
    expected = expand(config, inputs=inputs)
    by_digest = {record["digest"]: record for record in cells}
    found = [(cell, by_digest[cell.digest]) for cell in expected if cell.digest in by_digest]
    done = {
        (c.spec.cell, c.spec.task, c.spec.seed): record["evaluate"] for c, record in found if record["status"] == "done"
    }
    left_out = [
        {
            "name": c.spec.cell,
            "task": c.spec.task,
            "seed": c.spec.seed,
            "status": record["status"],
            "error": record["error"],
        }
        for c, record in found
        if record["status"] != "done"
    ]
    comparisons = _comparisons(config, done)
    statuses = [record["status"] for _, record in found]
    mixed = _tasks_of_mixed_code(found)
    complete = len(done) == len(expected) and not mixed
    return records.new_record(
        "study",
        config=pydantic.TypeAdapter(StudyConfig).dump_python(config, mode="json"),
        status="done" if complete else "provisional",
        name=config.name,
        arms=list(config.cells),
        tasks=[_task_table(config, task, done) for task in config.tasks],
        comparisons=[comparison.to_dict() for comparison in comparisons],
        num_comparisons=len(config.comparisons) * len(config.tasks),
        minimum_detectable_effect=[
            {
                "arm": c.arm,
                "baseline": c.baseline,
                "task": c.task,
                "effect": stats.resolvable_effect(c.result, num_comparisons=len(comparisons)),
            }
            for c in comparisons
        ],
        method=stats.METHOD,
        num_cells={"expected": len(expected), **{status: statuses.count(status) for status in sorted(set(statuses))}},
        missing=[cell.path.name for cell in expected if cell.digest not in by_digest],
        failures=left_out,
        mixed_code=mixed,
    )


def _tasks_of_mixed_code(found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> list[str]:
    """Tasks whose done cells ran different sources: their differences may be the code's, so the study is provisional."""
    codes: dict[str, set[str | None]] = {}
    for cell, record in found:
        if record["status"] == "done":
            codes.setdefault(cell.spec.task, set()).add(record.get("environment", {}).get("code"))
    return sorted(task for task, different in codes.items() if len(different) > 1)


Done = Mapping[tuple[str, str, int], Mapping[str, Any]]
"""(cell, task, seed) -> evaluate record."""


def _task_table(config: StudyConfig, task: StudyTask, done: Done) -> dict[str, Any]:
    arms = []
    for name in config.cells:
        evaluations = [done[(name, task.name, seed)] for seed in config.seeds if (name, task.name, seed) in done]
        if not evaluations:
            continue
        metrics = {}
        for metric in evaluations[0]["metrics"]:
            interval, over, values = metric_interval(evaluations, metric)
            metrics[metric] = {**interval.to_dict(), "over": over, "values": values}
        arms.append({"name": name, "num_seeds": len(evaluations), "metrics": metrics})
    return {"task": task.name, "size": task.size, "primary": task.primary, "arms": arms}


def metric_interval(evaluations: Sequence[Mapping[str, Any]], metric: str) -> tuple[stats.Interval, str, list[float]]:
    """Return mean and interval, what it ranges over ("seeds", or "examples" for one seed), and each seed's value."""
    values = [float(evaluation["metrics"][metric]) for evaluation in evaluations]
    if len(values) > 1:
        # Student's interval of a share near 0 or 1 reaches beyond what a share can be.
        interval = stats.mean_interval(values)
        return (stats.clipped(interval) if all(0 <= v <= 1 for v in values) else interval), "seeds", values
    scores = evaluations[0]["scores"].get(metric)
    return (stats.example_interval(scores) if scores else stats.mean_interval(values)), "examples", values


def _comparisons(config: StudyConfig, done: Done) -> list[stats.Comparison]:
    """The declared comparisons that have data, with Holm's adjustment over all; a missing one counts as p = 1."""
    made = []
    for task in config.tasks:
        for arm, baseline in config.comparisons:
            result = _paired(config, task, arm, baseline, done)
            if result is not None:
                made.append(
                    stats.Comparison(arm=arm, baseline=baseline, task=task.name, metric=task.primary, result=result)
                )
    missing = len(config.tasks) * len(config.comparisons) - len(made)
    adjusted = stats.holm([comparison.result.p for comparison in made] + [1.0] * missing)
    return [replace(comparison, p_holm=p) for comparison, p in zip(made, adjusted, strict=False)]


def _paired(config: StudyConfig, task: StudyTask, arm: str, baseline: str, done: Done) -> stats.Difference | None:
    sides = [[(seed, done.get((name, task.name, seed))) for seed in config.seeds] for name in (arm, baseline)]
    untrained = [config.cells[n].recipe is None and config.cells[n].reuse is None for n in (arm, baseline)]
    kept = [
        [
            evaluation
            for seed, evaluation in side
            if evaluation and (fixed or _both(arm, baseline, task, seed, untrained, done))
        ]
        for side, fixed in zip(sides, untrained, strict=True)
    ]
    if not kept[0] or not kept[1]:
        return None
    scores = [score_array(evaluations, task.primary) for evaluations in kept]
    if kept[0][0]["example_ids"] != kept[1][0]["example_ids"]:
        raise RecordError(
            f"{task.name}: {arm} and {baseline} were evaluated on different examples, so they cannot be paired."
        )
    return stats.paired_difference(scores[0], scores[1], seed=0)


def _both(arm: str, baseline: str, task: StudyTask, seed: int, untrained: Sequence[bool], done: Done) -> bool:
    names = [name for name, fixed in zip((arm, baseline), untrained, strict=True) if not fixed]
    return all((name, task.name, seed) in done for name in names)


def score_array(evaluations: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return scores as `[seeds, examples]`. Raises `RecordError` when examples differ or `metric` is missing."""
    first = evaluations[0]
    for evaluation in evaluations:
        where = f"evaluation of {evaluation.get('name')!r} on {evaluation.get('task')!r}, seed {evaluation.get('seed')}"
        if metric not in evaluation["scores"]:
            raise RecordError(f"{where}: no scores of {metric!r}; {nearest(metric, evaluation['scores'])}.")
        if evaluation["example_ids"] != first["example_ids"] or len(evaluation["scores"][metric]) != len(
            first["example_ids"]
        ):
            raise RecordError(
                f"{where}: its examples are not those of the first seed. Evaluate all arms on the same data."
            )
    return np.asarray([evaluation["scores"][metric] for evaluation in evaluations], dtype=np.float64)
