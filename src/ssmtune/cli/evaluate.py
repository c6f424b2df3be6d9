"""`ssmtune evaluate`: how well a run, or a base model, answers a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmtune.cli.output import make_table, print_result, print_table, quiet_libraries
from ssmtune.errors import ConfigError


def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory, or a model for the base alone.")],
    task: Annotated[str | None, typer.Option(help="Name of a task; the run's own by default.")] = None,
    size: Annotated[float | None, typer.Option(help="Share of the task's full size; the run's own by default.")] = None,
    num_examples: Annotated[int | None, typer.Option(help="Use at most this many held-out examples.")] = None,
    batch_examples: Annotated[int, typer.Option(help="Examples answered at once.")] = 64,
    base: Annotated[bool, typer.Option(help="Also evaluate the base and pair the two by example.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Answer a task's held-out examples greedily, beside the base, with a paired difference and its interval.

    Examples: [cyan]ssmtune evaluate runs/first[/cyan] .
    [cyan]ssmtune evaluate tiny-granite-h --task rules --num-examples 50[/cyan]
    """
    quiet_libraries()
    from ssmtune.evaluate import EvaluateConfig
    from ssmtune.evaluate import evaluate as evaluate_stage
    from ssmtune.records import read_record, write_json
    from ssmtune.stats import paired_difference

    trained = None
    if (Path(run) / "run.json").is_file():
        trained = read_record(Path(run) / "run.json", kind="train")
        task, size = _same_split(trained["config"]["data"], task, size)
    if task is None:
        raise ConfigError("--task is missing: this is not a run on a task of ssmtune. Name the task to answer.")
    alone = EvaluateConfig(
        model=run, task=task, size=size or 1.0, num_examples=num_examples, batch_examples=batch_examples, name="base"
    )
    records = []
    if trained is not None:
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
    names = [record["name"] for record in records]
    headings = ["metric", *names, *(["difference [95 % interval]"] if len(records) == 2 else [])]
    title = f"{task}, {len(records[0]['example_ids'])} held-out examples"
    table = make_table(title, *headings, numbers=headings[1:])
    for metric in records[0]["metrics"]:
        row = [metric, *(f"{record['metrics'][metric]:.1%}" for record in records)]
        if len(records) == 2:
            ours, theirs = ([record["scores"][metric]] for record in records)
            result = paired_difference(ours, theirs, seed=0)
            row.append(f"{result.difference:+.1%} [{result.low:+.1%}, {result.high:+.1%}]")
        table.add_row(*row)
    print_table(table)


def _same_split(data: dict[str, Any], task: str | None, size: float | None) -> tuple[str | None, float | None]:
    """The task and size to evaluate a run on; a task is split anew at each size, so another size would test on training data."""
    task = task or data["task"]
    if task != data["task"]:
        return task, size
    if size is not None and size != data["size"]:
        raise ConfigError(
            f"--size {size}: the run was trained on {task} at size {data['size']}, and other sizes hold out other examples, "
            f"so the test could contain training examples. Leave --size out, or give {data['size']}."
        )
    return task, data["size"]
