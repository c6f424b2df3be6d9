"""`ssmtune evaluate`: how well a run, or a base model, answers a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ssmtune.cli.output import print_result, quiet_libraries, tables


def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory, or a model for the base alone.")],
    task: Annotated[str, typer.Option(help="Name of a task.")],
    size: Annotated[float, typer.Option(help="Share of the task's full size; must match the training run's.")] = 1.0,
    num_examples: Annotated[int | None, typer.Option(help="Use at most this many held-out examples.")] = None,
    batch_examples: Annotated[int, typer.Option(help="Examples answered at once.")] = 64,
    base: Annotated[bool, typer.Option(help="Also evaluate the base and pair the two by example.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Answer a task's held-out examples greedily, beside the base, with a paired difference and its interval.

    Examples: [cyan]ssmtune evaluate runs/first --task classification --size 0.02[/cyan] .
    [cyan]ssmtune evaluate tiny-granite-h --task rules --num-examples 50[/cyan]
    """
    quiet_libraries()
    from rich.table import Table

    from ssmtune.evaluate import EvaluateConfig
    from ssmtune.evaluate import evaluate as evaluate_stage
    from ssmtune.records import read_record, write_json
    from ssmtune.stats import paired_difference

    alone = EvaluateConfig(
        model=run, task=task, size=size, num_examples=num_examples, batch_examples=batch_examples, name="base"
    )
    records = []
    if (Path(run) / "run.json").is_file():
        trained = read_record(Path(run) / "run.json", kind="train")
        alone = replace(alone, model=trained["config"]["model"])
        adapted = replace(alone, adapter=str(Path(run) / "adapter"), name=trained["name"])
        records.append(evaluate_stage(adapted))
        write_json(Path(run) / f"evaluate-{task}.json", records[0])
    else:
        base = True
    if base:
        records.append(evaluate_stage(alone))
    if json_output:
        print_result(records)
        return
    table = Table(title=f"{task}, {len(records[0]['example_ids'])} held-out examples")
    table.add_column("metric")
    for record in records:
        table.add_column(record["name"], justify="right")
    if len(records) == 2:
        table.add_column("difference [95 % interval]", justify="right")
    for metric in records[0]["metrics"]:
        row = [metric, *(f"{record['metrics'][metric]:.1%}" for record in records)]
        if len(records) == 2:
            ours, theirs = ([record["scores"][metric]] for record in records)
            result = paired_difference(ours, theirs, seed=0)
            row.append(f"{result.difference:+.1%} [{result.low:+.1%}, {result.high:+.1%}]")
        table.add_row(*row)
    tables().print(table)
