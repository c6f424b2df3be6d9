"""The last checkpoint of a run is whole and holds what an exact continuation needs.

This is evidence from files. That a resumed run equals an uninterrupted one in every loss and weight is a test of the
project (it trains twice), not something that can be checked on a finished run.
"""

from __future__ import annotations

import json
from pathlib import Path

from ssmtune.records import file_sha256
from ssmtune.verify.base import Check, CheckResult, Subject

NEEDED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors", "ssmtune.safetensors")


def _run(subject: Subject) -> CheckResult:
    """Measured: files that are missing or not as written, and steps that contradict each other. Limit: 0."""
    assert subject.run_dir is not None
    checkpoints = sorted(
        (subject.run_dir / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    if not checkpoints:
        where = str(subject.run_dir / "checkpoints")
        return CheckResult(name="resume", ok=False, measured=1, limit=0, where=where, detail="no checkpoint is left")
    last = checkpoints[-1]
    faults = _faults(last)
    return CheckResult(
        name="resume",
        ok=not faults,
        measured=len(faults),
        limit=0,
        where=next(iter(faults), ""),
        detail="; ".join(faults.values())
        or f"{last.name}: every file as written, with optimiser, schedule and data order",
    )


def _faults(checkpoint: Path) -> dict[str, str]:
    faults = {}
    complete = checkpoint / "complete.json"
    try:
        digests = json.loads(complete.read_text(encoding="utf-8"))["sha256"]
        adapter = json.loads((checkpoint / "ssmtune.json").read_text(encoding="utf-8"))
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        return {str(complete): f"{checkpoint.name} is not complete ({error})"}
    for name in NEEDED:
        if name not in digests:
            faults[str(checkpoint / name)] = f"{name} is missing"
    for name, expected in digests.items():
        path = checkpoint / name
        if not path.is_file() or file_sha256(path) != expected:
            faults[str(path)] = f"{name} is not the file that complete.json vouches for"
    step = int(checkpoint.name.rpartition("-")[2])
    for label, found in (("ssmtune.json", adapter["step"]), ("trainer_state.json", state["global_step"])):
        if found != step:
            faults[str(checkpoint / label)] = f"{label} is of step {found}, the checkpoint of step {step}"
    return faults


CHECK = Check(proves="the last checkpoint can be continued from", run=_run, needs_run=True)
