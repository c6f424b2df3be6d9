"""`ssmtune study`: many runs, declared in advance, with paired statistics."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmtune.cli.output import print_result, quiet_libraries, split_list, words

if TYPE_CHECKING:
    from ssmtune.study_config import StudyConfig


class Engine(str, Enum):
    """Where cells run."""

    local = "local"
    ray = "ray"


def study(
    study_yaml: Annotated[Path, typer.Argument(help="The study's models, cells, tasks, seeds and comparisons.")],
    devices: Annotated[str, typer.Option(help="GPUs to use, comma separated; empty for the CPU.")] = "",
    engine: Annotated[Engine, typer.Option(help="Processes on this machine, or a running Ray cluster.")] = Engine.local,
    address: Annotated[str, typer.Option(help="With --engine ray: the cluster's address.")] = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what is left to do and how long, and stop.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run one cell of each kind first, for the time.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="List the cells and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the study record, or estimate, as JSON.")] = False,
) -> None:
    """Run every cell of a study that is not done yet, then compare as declared. Run it again to continue or retry.

    Declared in the file: cells, tasks, seeds, and which comparisons count; written down before the first run.
    Cells run side by side, `workers` at a time; worker k uses the k-th device of --devices, over and over.

    Examples. What it will take: [cyan]ssmtune study study.yaml --estimate --calibrate[/cyan]

    On two GPUs: [cyan]ssmtune study recipes/granite_study.yaml --devices 0,1[/cyan]

    On a Ray cluster: [cyan]ssmtune study study.yaml --engine ray --address auto[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import load_yaml
    from ssmtune.study import estimate_study
    from ssmtune.study_cells import expand
    from ssmtune.study_config import StudyConfig
    from ssmtune.study_estimate import calibration_cells
    from ssmtune.study_runs import cost_of, study_inputs

    config = load_yaml(StudyConfig, study_yaml)
    inputs = study_inputs(config)
    cells = expand(config, inputs=inputs)
    if dry_run:
        for cell in cells:
            words.print(f"{cell.path.name}  {cell.digest}", markup=False)
        return
    if calibrate:
        _run(config, engine, address, devices, inputs, only=[cell.digest for cell in calibration_cells(cells)])
    left = estimate_study(config, cost_of, inputs=inputs)
    words.print(left.text(), markup=False)
    if estimate:
        if json_output:
            print_result(left.to_dict())
        return
    record = _run(config, engine, address, devices, inputs, only=None)
    if json_output:
        print_result(record)
    else:
        words.print(f"{record['status']}: {config.output_dir}/study.json.gz. 'ssmtune report {config.output_dir}'")


def _run(
    config: StudyConfig, engine: Engine, address: str, devices: str, inputs: dict[str, str], *, only: list[str] | None
) -> dict[str, Any]:
    from ssmtune.errors import ConfigError
    from ssmtune.ray_workers import ray_slots
    from ssmtune.study import run_study
    from ssmtune.study_runs import run_cell

    if engine is Engine.local:
        return run_study(config, run_cell, devices=split_list(devices), inputs=inputs, only=only)
    if devices:
        raise ConfigError(f"--devices {devices}: on Ray the cluster says which GPUs there are. Leave it out.")
    with ray_slots(max(1, config.workers), address=address) as slots:
        return run_study(config, run_cell, slots=slots, inputs=inputs, only=only)
