"""A study of synthetic cells that tests run in a process of its own and kill. Usage: killable_study.py FOLDER ENGINE"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import rich.console

sys.path.insert(0, str(Path(__file__).resolve().parent))

import synthetic_records as synthetic

from ssmtune import config as decoding
from ssmtune import records, study
from ssmtune.ray_workers import ray_slots
from ssmtune.study import CellSpec, StudyConfig

QUIET = rich.console.Console(file=io.StringIO())


def environment() -> dict[str, Any]:
    """Asking git and the device for every record would be most of the time of these tests."""
    return synthetic.ENVIRONMENT


def config(folder: Path, num_seeds: int, *, workers: int = 0, cell_seconds: int | None = None) -> StudyConfig:
    """Ten cells for each seed."""
    whole = {
        "name": "killed",
        "model": "tiny",
        "tasks": [{"name": "rules", "size": "1.0", "primary": "exact"}],
        "seeds": list(range(num_seeds)),
        "cells": {f"arm{k}": {"recipe": "all"} for k in range(9)} | {"reused": {"reuse": "arm0"}},
        "comparisons": [[f"arm{k}", "arm0"] for k in range(1, 9)],
        "output_dir": str(folder),
        "workers": workers,
        "cell_seconds": cell_seconds,
    }
    return decoding.decode(StudyConfig, whole, where="study.yaml")


def cell(spec: CellSpec) -> dict[str, Any]:
    """A cell that takes no time."""
    return synthetic.cheap_cell(spec)


def slow_cell(spec: CellSpec) -> dict[str, Any]:
    """A cell that takes some, in a process that says which one it is."""
    records.environment = environment
    Path(spec.output_dir, f"{os.getpid()}.pid").write_text(str(os.getpid()))
    time.sleep(0.05)
    return synthetic.cheap_cell(spec)


def dying_cell(spec: CellSpec) -> dict[str, Any]:
    """Kills its own process the first time that one cell is run."""
    marker = Path(spec.output_dir, "killed")
    if (spec.cell, spec.seed) == ("arm3", 1) and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), 9)
    return slow_cell(spec)


def hanging_cell(spec: CellSpec) -> dict[str, Any]:
    """Never ends the first time that one cell is run."""
    marker = Path(spec.output_dir, "hung")
    if (spec.cell, spec.seed) == ("arm3", 1) and not marker.exists():
        marker.touch()
        time.sleep(600)
    return slow_cell(spec)


def main() -> None:
    """Run or continue the study."""
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    records.environment = environment
    if engine == "here":
        study.run_study(config(folder, 20), cell, console=QUIET)
    elif engine == "workers":
        study.run_study(config(folder, 2, workers=2), slow_cell, console=QUIET)
    else:
        with ray_slots(2, address=engine) as slots:
            study.run_study(config(folder, 2, workers=2), slow_cell, slots=slots, console=QUIET)


if __name__ == "__main__":
    main()
