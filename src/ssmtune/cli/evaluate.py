"""`ssmtune evaluate`: how well a run, or a base model, answers a task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmtune.cli.output import print_evaluation, print_result, quiet_libraries, split_list
from ssmtune.errors import ConfigError


def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory, or a model for the base alone.")],
    task: Annotated[str | None, typer.Option(help="Name of a task; the run's own by default.")] = None,
    size: Annotated[float | None, typer.Option(help="Share of the task's full size; the run's own by default.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Directory with the tasks' sets, or 'hub' to download the one; SSMTUNE_DATA by default."),
    ] = None,
    num_examples: Annotated[
        int | None, typer.Option("--num-examples", "--limit", help="Use at most this many held-out examples.")
    ] = None,
    batch_examples: Annotated[int, typer.Option(help="Examples answered at once.")] = 64,
    base: Annotated[
        bool,
        typer.Option(
            help="Also evaluate the base (with --engine llamacpp: the same weights in transformers) and pair the two."
        ),
    ] = True,
    shots: Annotated[
        int | None,
        typer.Option(help="Show the base this many solved examples before every question; a run is shown none."),
    ] = None,
    allow_execution: Annotated[
        bool, typer.Option("--allow-execution", help="Run the programs that the model writes, in a sandbox.")
    ] = False,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness instead, with commas: arc_easy,hellaswag.")
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option(help="With --harness: a directory of its task files, your own.")
    ] = None,
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
    [cyan]ssmtune evaluate tiny-granite-h --task rules --num-examples 50[/cyan] .
    [cyan]ssmtune evaluate runs/first --task gsm8k --data ~/data --shots 4[/cyan] .
    [cyan]ssmtune evaluate runs/first --harness arc_easy,hellaswag --limit 200[/cyan]
    """
    quiet_libraries()
    from ssmtune.config import decode
    from ssmtune.evaluate import EvaluateConfig
    from ssmtune.evaluate import evaluate as evaluate_stage
    from ssmtune.records import read_record, write_json

    trained = None
    if (Path(run) / "run.json").is_file():
        trained = read_record(Path(run) / "run.json", kind="train")
    if harness is not None:
        _reject_with_harness({"--task": task, "--size": size, "--data": data, "--gguf": gguf, "--type": type_})
        _show(
            _through_harness(run, trained, harness, harness_tasks, num_examples, shots, batch_examples, base),
            json_output,
        )
        return
    if harness_tasks is not None:
        raise ConfigError("--harness-tasks is read with --harness alone: name the tasks to evaluate there.")
    if trained is not None:
        task, size = _same_split(trained["config"]["data"], task, size)
        data = data or trained["config"]["data"].get("directory")
    if task is None:
        raise ConfigError("--task is missing: this is not a run on a task of ssmtune. Name the task to answer.")
    fields = {
        "model": trained["config"]["model"] if trained else run,
        "task": task,
        "size": size or 1.0,
        "directory": data,
        "shots": 0 if trained else shots or 0,
        "allow_execution": allow_execution,
        "num_examples": num_examples,
        "batch_examples": batch_examples,
        "adapter": str(Path(run) / "adapter") if trained else None,
        "name": trained["name"] if trained else _base_name(shots),
        "engine": engine,
        "gguf_type": type_,
        "gguf": None if gguf is None else str(gguf),
    }
    if shots and trained and (not base or engine == "llamacpp"):
        raise ConfigError("--shots: solved examples are shown to the base, which is not evaluated here. Leave it out.")
    config = decode(EvaluateConfig, fields, where="ssmtune evaluate")
    first = evaluate_stage(config)
    partner = None
    ending = task
    if engine == "llamacpp":
        partner = replace(config, engine="transformers", gguf=None, gguf_type=None)
        first["name"] += f" in llama.cpp, {first['engine']['gguf_type']}"
        ending += f"-llamacpp-{first['engine']['gguf_type']}"
    elif trained is not None:
        partner = replace(config, adapter=None, name=_base_name(shots), shots=shots or 0)
    records = [first]
    if trained is not None:
        write_json(Path(run) / f"evaluate-{ending}.json", first)
    if base and partner is not None:
        records.append(evaluate_stage(partner))
    _show([records], json_output)


def _base_name(shots: int | None) -> str:
    return f"base, {shots} shots" if shots else "base"


def _reject_with_harness(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"--harness: got {', '.join(given)} as well, which its tasks do not read. Leave it out.")


def _through_harness(
    run: str,
    trained: dict[str, Any] | None,
    tasks: str,
    directory: Path | None,
    limit: int | None,
    shots: int | None,
    batch_examples: int,
    base: bool,
) -> list[list[dict[str, Any]]]:
    """Evaluate through the harness and keep the records of a run; per task the run's record and, with `base`, the base's."""
    from ssmtune.config import decode
    from ssmtune.harness import HarnessConfig, evaluate_harness
    from ssmtune.records import write_json

    fields = {
        "model": trained["config"]["model"] if trained else run,
        "tasks": list(split_list(tasks)),
        "adapter": str(Path(run) / "adapter") if trained else None,
        "limit": limit,
        "shots": shots,
        "batch_examples": batch_examples,
        "task_directory": None if directory is None else str(directory),
        "name": trained["name"] if trained else "base",
    }
    config = decode(HarnessConfig, fields, where="ssmtune evaluate --harness")
    records = [[record] for record in evaluate_harness(config)]
    if trained is not None:
        for (record,) in records:
            write_json(Path(run) / f"evaluate-{record['task'].replace(':', '-').replace('/', '-')}.json", record)
        if base:
            partners = evaluate_harness(replace(config, adapter=None, name="base"))
            records = [[*pair, partner] for pair, partner in zip(records, partners, strict=True)]
    return records


def _show(pairs: list[list[dict[str, Any]]], json_output: bool) -> None:
    if json_output:
        print_result([record for records in pairs for record in records])
        return
    for records in pairs:
        print_evaluation(records)


def _same_split(data: dict[str, Any], task: str | None, size: float | None) -> tuple[str | None, float | None]:
    """The task and size to evaluate a run on. Each size of a generated task is split anew: another could test training data."""
    from ssmtune.tasks.base import GeneratedTask, get_task

    task = task or data["task"]
    if task != data["task"]:
        return task, size
    if task is None or size is None or size == data["size"]:
        return task, data["size"]
    if isinstance(get_task(task), GeneratedTask):
        raise ConfigError(
            f"--size {size}: the run was trained on {task} at size {data['size']}, and other sizes hold out other examples, "
            f"so the test could contain training examples. Leave --size out, or give {data['size']}."
        )
    return task, data["size"]
