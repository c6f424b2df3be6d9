"""Studies: declared cells run over tasks and seeds, each kept as a record, compared only as declared in advance."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import time
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pydantic
import rich.console
import rich.progress

from ssmtune import records, stats, workers
from ssmtune.errors import RecordError, SsmtuneError, TrainingFailed
from ssmtune.study_analysis import analyse, declared, metric_interval, num_comparisons, score_array
from ssmtune.study_cells import Cell, CellSpec, expand
from ssmtune.study_config import StudyCell, StudyConfig, StudyTask
from ssmtune.study_estimate import Cost, Estimate, estimate

__all__ = [
    "Cell",
    "CellSpec",
    "RunCell",
    "StudyCell",
    "StudyConfig",
    "StudyTask",
    "analyse",
    "estimate_study",
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
"""Returns {"train": train record or None, "evaluate": evaluate record, "transfer": [evaluate records]}, and, where rates
were chosen, "tuned". A tuning run's evaluation is None. Raises when the cell fails."""


def run_study(
    config: StudyConfig,
    run_cell: RunCell,
    *,
    devices: Sequence[str] = (),
    slots: Sequence[workers.Slot] | None = None,
    inputs: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Run every cell that has no done record of the same digest; return and write the study record.

    Writes a pre-registration first, then one record per cell, failed ones included; a later call retries those.
    `slots` is where cells run: by default `config.workers` processes on this machine, of which k sees only
    `devices[k % len(devices)]`; `only` are the digests of cells to stop after. A worker that dies fails its own cell only,
    and that cell is tried again.
    On Ctrl-C finished cells stay done and running ones are stopped.
    Raises `RecordError` while another process runs this study.
    """
    with _alone(Path(config.output_dir)):
        cells = expand(config, inputs=inputs)
        registration = preregister(config, inputs=inputs)
        earlier = {cell.digest: record for cell in cells if (record := _existing(cell)) is not None}
        found = {digest: record for digest, record in earlier.items() if record["status"] == "done"}
        jobs = [workers.Job(key=c.digest, argument=c, needs=c.needs) for c in cells if c.digest not in found]
        jobs = [job for job in jobs if only is None or job.key in only]
        if slots is None:
            slots = workers.local_slots(min(config.workers, len(jobs)), devices)
        call = functools.partial(_execute, run_cell, registration)
        with (
            _progress(console) as progress,
            contextlib.closing(
                workers.run_jobs(
                    jobs,
                    call,
                    slots=slots,
                    done=frozenset(found),
                    succeeded=_is_usable,
                    retries=config.retries,
                    # What a message of ours explains, another attempt would not change.
                    is_final=lambda error: isinstance(error, SsmtuneError),
                    seconds=config.cell_seconds,
                )
            ) as ended,
        ):
            before, started = len(found), time.monotonic()
            bar = progress.add_task(
                config.name,
                total=before + len(jobs),
                completed=before,
                failed=0,
                running=min(len(jobs), len(slots)),
                left="",
            )
            for job, outcome in ended:
                record = found[job.key] = _outcome(job.argument, registration, outcome, earlier.get(job.key))
                failed = sum(r["status"] == "failed" for r in found.values())
                pace = (time.monotonic() - started) / (len(found) - before)
                left = _duration(pace * (before + len(jobs) - len(found)))
                progress.update(bar, completed=len(found), failed=failed, running=outcome.num_running, left=left)
                if record["error"]:
                    progress.console.print(
                        f"{record['status']}: {job.argument.path.name}: {record['error']}", style="red", markup=False
                    )
        study = analyse(list(found.values()), config, inputs=inputs)
        records.write_json(Path(config.output_dir) / "study.json.gz", study)
    return study


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the study's directory; the lock goes with the process, however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(
                f"{directory}: another process runs this study. Wait for it, or end it; finished cells stay."
            ) from None
        yield


EXECUTION = ("output_dir", "workers", "retries", "cell_seconds")
"""Fields that say how a study is run, not what it is."""


def preregister(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> str:
    """Write config, outcomes and comparisons to `preregistration-<digest>.json`, unless it exists; return the digest.

    Raises `RecordError` when the file says something else than its digest: then it was changed afterwards.
    """
    plain = pydantic.TypeAdapter(StudyConfig).dump_python(config, mode="json")
    plain = {name: value for name, value in plain.items() if name not in EXECUTION}
    declaration = {"config": plain, "inputs": dict(inputs or {})}
    digest = records.digest(declaration)
    path = Path(config.output_dir) / f"preregistration-{digest}.json"
    if path.exists():
        kept = records.read_record(path)
        if records.digest({name: kept.get(name) for name in declaration}) != digest:
            raise RecordError(f"{path}: was changed after it was written. Restore it, or declare a new study.")
        return digest
    families = {}
    for name, family in config.all_families().items():
        num = len(declared(config, family))
        families[name] = {"num_comparisons": num, "minimum_detectable_effect": _resolvable_ahead(config, num)}
    value = {
        "kind": "preregistration",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "digest": digest,
        **declaration,
        "num_cells": len(expand(config, inputs=inputs)),
        "num_comparisons": num_comparisons(config),
        "families": families,
        "primary_outcomes": {task.name: task.primary for task in (*config.tasks, *config.transfer)},
        "method": stats.METHOD,
        "assumed_sd": ASSUMED_SD,
        "minimum_detectable_effect": max(
            (f["minimum_detectable_effect"] for f in families.values() if f["minimum_detectable_effect"]), default=None
        ),
    }
    records.write_json(path, value)
    return digest


def _resolvable_ahead(config: StudyConfig, num: int) -> float | None:
    if not config.num_examples or not num:
        return None
    return stats.minimum_detectable_effect(
        num_seeds=len(config.seeds), num_examples=config.num_examples, sd_noise=ASSUMED_SD, num_comparisons=num
    )


def estimate_study(
    config: StudyConfig, cost_of: Callable[[CellSpec], Cost], *, inputs: Mapping[str, str] | None = None
) -> Estimate:
    """Return what the cells that have no done record will cost; runs nothing."""
    cells = expand(config, inputs=inputs)
    found = {cell.digest: record for cell in cells if (record := _existing(cell)) is not None}
    return estimate(cells, found, cost_of, workers=config.workers)


def read_cells(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the cell records whose digest matches the config; missing, unreadable and older ones are left out."""
    return [record for cell in expand(config, inputs=inputs) if (record := _existing(cell)) is not None]


def _existing(cell: Cell) -> dict[str, Any] | None:
    try:
        record = records.read_record(cell.path, kind=_kind(cell))
    except (RecordError, zlib.error):
        return None
    return record if record.get("digest") == cell.digest else None


def _kind(cell: Cell) -> records.Kind:
    return "study_tuning" if cell.spec.rates else "study_cell"


def _execute(run_cell: RunCell, registration: str, cell: Cell) -> dict[str, Any]:
    """Run one cell where it was sent, write its record and return it.

    Made there, so that it names the device that was used; written there, so that nothing finished is lost with the caller.
    """
    started = time.monotonic()
    try:
        result = run_cell(cell.spec)
    except TrainingFailed as diverged:
        if not cell.spec.rates:
            raise
        # A rate at which training diverges is an answer.
        return _write(cell, _record(cell, registration, "done", validation_loss=None, error=str(diverged)))
    train, evaluations = result.get("train"), [result["evaluate"], *result.get("transfer", ())]
    statuses = [record["status"] for record in (train, *evaluations) if record is not None]
    worst = next((status for status in ("failed", "aborted", "provisional") if status in statuses), "done")
    error = None if worst == "done" else f"a stage ended as {worst}"
    seconds = time.monotonic() - started
    if cell.spec.rates:
        assert train is not None
        loss = min((entry["eval_loss"] for entry in train["eval_history"]), default=None)
        return _write(cell, _record(cell, registration, worst, validation_loss=loss, error=error, seconds=seconds))
    facts = {"train": train, "evaluate": evaluations[0], "transfer": evaluations[1:], "tuned": result.get("tuned", {})}
    return _write(cell, _record(cell, registration, worst, **facts, error=error, seconds=seconds))


def _is_usable(record: dict[str, Any]) -> bool:
    return record["status"] in ("done", "provisional")


def _record(cell: Cell, registration: str, status: Any, **facts: Any) -> dict[str, Any]:
    spec = cell.spec
    names = {"name": spec.arm, "task": spec.task, "seed": spec.seed, "digest": cell.digest}
    axes = {"model": spec.model_name, "data_order": spec.data_order, "draw": spec.draw}
    given = {**names, **axes, **({"rates": spec.rates} if spec.rates else {}), "preregistration": registration}
    plain = pydantic.TypeAdapter(CellSpec).dump_python(spec, mode="json")
    return records.new_record(_kind(cell), config=plain, status=status, **given, **facts)


def _write(cell: Cell, record: dict[str, Any]) -> dict[str, Any]:
    records.write_json(cell.path, record)
    return record


def _outcome(
    cell: Cell, registration: str, outcome: workers.Outcome[dict[str, Any]], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the record of a cell that ended, with the failures that preceded it; write what its worker has not."""
    attempts = [{"error": _text(error)} for error in outcome.earlier]
    if before is not None and before["status"] == "failed":
        attempts = [*before.get("failed_attempts", ()), {"error": before["error"]}, *attempts]
    error = outcome.error
    if outcome.value is not None:
        record = outcome.value
        # The file of a worker on another machine may not be here.
        if not attempts and cell.path.exists():
            return record
    elif error is None:
        record = _record(cell, registration, "failed", error="a cell whose outcome it needs failed" + _reused(cell))
    else:
        trace = (
            {}
            if isinstance(error, (SsmtuneError, workers.WorkerDied, workers.JobOverdue))
            else {"traceback": _trace(error)}
        )
        record = _record(cell, registration, "failed", error=_text(error), **trace)
    return _write(cell, {**record, "failed_attempts": attempts})


def _reused(cell: Cell) -> str:
    return f": {cell.spec.reuse!r}, whose run it reuses" if cell.spec.reuse else ": a tuning run"


def _text(error: BaseException) -> str:
    if isinstance(error, workers.WorkerDied):
        return "the worker process died (killed, or out of memory)"
    if isinstance(error, workers.JobOverdue):
        return f"the cell {error}"
    return str(error) if isinstance(error, SsmtuneError) else f"{type(error).__name__}: {error}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _duration(seconds: float) -> str:
    """Seconds for a reader: "2:05:07"."""
    return str(timedelta(seconds=round(seconds)))


def _progress(console: rich.console.Console | None) -> rich.progress.Progress:
    columns = ("[bold]{task.description}", "{task.completed}/{task.total} ended, {task.fields[failed]} failed, ")
    return rich.progress.Progress(
        rich.progress.TextColumn(columns[0]),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(columns[1] + "{task.fields[running]} running"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left: {task.fields[left]}"),
        console=console or rich.console.Console(stderr=True),
    )
