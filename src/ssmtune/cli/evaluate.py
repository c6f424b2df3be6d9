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
    base: Annotated[
        bool,
        typer.Option(
            help="Also evaluate the base (with --engine llamacpp: the same weights in transformers) and pair the two."
        ),
    ] = True,
    engine: Annotated[str, typer.Option(help="transformers, or llamacpp: the merged model as a GGUF file.")] = (
        "transformers"
    ),
    type_: Annotated[
        str | None,
        typer.Option("--type", help="llamacpp: f32, f16 (default), bf16, q8_0 or q4_k_m, where --gguf is not given."),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="llamacpp: a GGUF file of this model, as 'export --to gguf' writes it.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Answer a task's held-out examples greedily, beside the base, with a paired difference and its interval.

    Examples: [cyan]ssmtune evaluate runs/first[/cyan] .
    [cyan]ssmtune evaluate runs/first --engine llamacpp --type q8_0[/cyan] .
    [cyan]ssmtune evaluate tiny-granite-h --task rules --num-examples 50[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import decode
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
    fields = {
        "model": trained["config"]["model"] if trained else run,
        "task": task,
        "size": size or 1.0,
        "num_examples": num_examples,
        "batch_examples": batch_examples,
        "adapter": str(Path(run) / "adapter") if trained else None,
        "name": trained["name"] if trained else "base",
        "engine": engine,
        "gguf_type": type_,
        "gguf": None if gguf is None else str(gguf),
    }
    config = decode(EvaluateConfig, fields, where="ssmtune evaluate")
    first = evaluate_stage(config)
    partner = None
    ending = task
    if engine == "llamacpp":
        partner = replace(config, engine="transformers", gguf=None, gguf_type=None)
        first["name"] += f" in llama.cpp, {first['engine']['gguf_type']}"
        ending += f"-llamacpp-{first['engine']['gguf_type']}"
    elif trained is not None:
        partner = replace(config, adapter=None, name="base")
    records = [first]
    if trained is not None:
        write_json(Path(run) / f"evaluate-{ending}.json", first)
    if base and partner is not None:
        records.append(evaluate_stage(partner))
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
