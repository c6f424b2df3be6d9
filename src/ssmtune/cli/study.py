"""`ssmtune study`: many runs, declared in advance, with paired statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import print_result, quiet_libraries, words


def study(
    study_yaml: Annotated[Path, typer.Argument(help="The study's cells, tasks, seeds and comparisons.")],
    devices: Annotated[str, typer.Option(help="GPUs to use, comma separated; empty for the CPU.")] = "",
    dry_run: Annotated[bool, typer.Option(help="List the cells and stop.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the study record as JSON.")] = False,
) -> None:
    """Run every cell of a study that is not done yet, then compare as declared. Run it again to continue or retry.

    Example: [cyan]ssmtune study recipes/granite_study.yaml --devices 0,1[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import load_yaml
    from ssmtune.study import run_study
    from ssmtune.study_cells import expand
    from ssmtune.study_config import StudyConfig
    from ssmtune.study_runs import run_cell, study_inputs

    config = load_yaml(StudyConfig, study_yaml)
    inputs = study_inputs(config)
    if dry_run:
        for cell in expand(config, inputs=inputs):
            words.print(f"{cell.path.name}  {cell.digest}", markup=False)
        return
    record = run_study(config, run_cell, devices=[d for d in devices.split(",") if d], inputs=inputs)
    if json_output:
        print_result(record)
    else:
        words.print(f"{record['status']}: {config.output_dir}/study.json.gz. 'ssmtune report {config.output_dir}'")
