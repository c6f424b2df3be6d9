"""`ssmtune train`: a run.yaml becomes a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import print_result, quiet_libraries, words


def train(
    run_yaml: Annotated[Path, typer.Argument(help="The run's settings.")],
    verify: Annotated[bool, typer.Option(help="Verify the run when it is done.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the run's record as JSON.")] = False,
) -> None:
    """Train as a run.yaml says, with checkpoints; run it again to continue where it was interrupted. Ends with verify.

    A minimal run.yaml:

        model: tiny-granite-h
        output_dir: runs/first
        recipe: all+core
        data: {task: classification, size: 0.02}        # or {train_file: mine.jsonl}
    """
    quiet_libraries()
    from ssmtune.config import load_yaml
    from ssmtune.train import TrainConfig
    from ssmtune.train import train as train_stage

    config = load_yaml(TrainConfig, run_yaml)
    record = train_stage(config, on_message=words.print)
    words.print(
        f"Trained {record['plan']['trainable']:,} parameters in {record['seconds']:.0f} s; restored step "
        f"{record['restored_step']}. Adapter: {config.output_dir}/adapter"
    )
    if verify:
        from ssmtune.cli.verify import verify_and_report

        report = verify_and_report(config.output_dir)
        record["verify"] = report.to_dict()
    if json_output:
        print_result(record)
    if verify and not report.ok:
        raise typer.Exit(1)
