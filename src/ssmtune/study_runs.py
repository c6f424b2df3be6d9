"""What a study cell does: train a recipe and evaluate it, evaluate another cell's run without its core, or the base."""

from __future__ import annotations

import gc
import shutil
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from ssmtune.config import decode
from ssmtune.errors import RecordError
from ssmtune.evaluate import EvaluateConfig, evaluate, evaluation_model
from ssmtune.models import load_tokenizer, model_location
from ssmtune.recipe import Recipe
from ssmtune.records import file_sha256, read_record
from ssmtune.study_cells import CellSpec
from ssmtune.study_config import StudyConfig
from ssmtune.study_estimate import Cost
from ssmtune.tasks.base import Side, SidedTask, get_task
from ssmtune.train import TrainConfig, num_training_steps, train
from ssmtune.training_data import DataConfig, catalogue_digest, prepare_data, task_side, task_sources


def run_cell(spec: CellSpec) -> dict[str, Any]:
    """Return {"train": record or None, "evaluate": record, "transfer": [records]}; a tuning run's has no evaluation.

    Its run directory stays below the study's; a tuning run's, which nothing needs, does not.
    """
    try:
        return _run_cell(spec)
    finally:
        _give_memory_back()


def _give_memory_back() -> None:
    """What a cell took from the device at its peak is other workers' as well, and the next one may never need it."""
    import torch

    if torch.cuda.is_available():
        # Trainers refer to themselves, so that their tensors wait for the collector.
        gc.collect()
        torch.cuda.empty_cache()


def _run_cell(spec: CellSpec) -> dict[str, Any]:
    train_record, tuned = None, choose_rates(spec)
    if spec.recipe is not None:
        train_record = train(_train_config(spec, tuned), on_message=_silent, progress=False)
        # Only the restored adapter is needed from here on, and a study has many runs.
        shutil.rmtree(Path(spec.run_dir) / "checkpoints", ignore_errors=True)
    if spec.rates:
        shutil.rmtree(spec.run_dir)
        return {"train": train_record, "evaluate": None}
    tasks = [(spec.task, spec.size), *((task.name, task.size) for task in spec.transfer)]
    configs = [_evaluate_config(spec, task, size) for task, size in tasks]
    model = evaluation_model(configs[0])
    first, *others = (evaluate(config, model=model, progress=False) for config in configs)
    return {"train": train_record, "evaluate": first, "transfer": others, "tuned": tuned}


def choose_rates(spec: CellSpec) -> dict[str, float]:
    """Return the rates of the tuning run with the lowest validation loss; {} where nothing was tuned."""
    losses = []
    for path in spec.tuning:
        record = read_record(path, kind="study_tuning")
        if record["validation_loss"] is not None:
            losses.append((record["validation_loss"], record["rates"]))
    if spec.tuning and not losses:
        raise RecordError(
            f"cell {spec.arm!r} on {spec.task}: no run of its {len(spec.tuning)} rates ended with a finite loss. "
            "Declare lower rates under 'tune'."
        )
    return dict(min(losses, key=lambda entry: entry[0])[1]) if losses else {}


def cost_of(spec: CellSpec) -> Cost:
    """Return the tokens that a cell trains on and the questions that it answers; prepares its data, once for all alike."""
    tokens = 0
    if spec.recipe is not None:
        config = _train_config(spec, {})
        num_rows, num_tokens = _prepared(spec.model, config.data)
        rows = num_training_steps(config, num_rows) * config.rows_per_step * config.num_accumulated
        tokens = round(rows * num_tokens / num_rows)
    tasks = [] if spec.rates else [(spec.task, spec.size), *((task.name, task.size) for task in spec.transfer)]
    questions = sum(
        min(spec.num_examples or sys.maxsize, _num_held_out(task, float(size), spec.directory)) for task, size in tasks
    )
    return Cost(tokens=tokens, questions=questions)


@lru_cache
def _prepared(model: str, data: DataConfig) -> tuple[int, int]:
    summary = prepare_data(data, load_tokenizer(model)).summary
    return summary["rows"]["train"], summary["tokens"]["train"]


@lru_cache
def _num_held_out(task: str, size: float, directory: str | None) -> int:
    return len(task_side(task, "test", size, directory))


def study_inputs(config: StudyConfig) -> dict[str, str]:
    """Digests of what a study only names: the base models' weights and the tasks' versions."""
    inputs: dict[str, str] = {}
    for name, model in config.bases().items():
        location = Path(model_location(model))
        weights = sorted(location.glob("*.safetensors")) if location.is_dir() else []
        inputs |= {"/".join(filter(None, ["model", name, path.name])): file_sha256(path) for path in weights}
    inputs["catalogue"] = catalogue_digest()
    names = sorted({task.name for task in (*config.tasks, *config.transfer)})
    for name in names:
        if isinstance(get_task(name), SidedTask):
            trains = any(cell.recipe is not None or cell.shots for cell in config.cells.values())
            sides: tuple[Side, ...] = ("train", "test") if trains else ("test",)
            for side in sides:
                inputs |= task_sources(name, side, config.directory)
    return inputs | {f"task/{name}": str(get_task(name).version) for name in names}


def _train_config(spec: CellSpec, tuned: dict[str, float]) -> TrainConfig:
    data = {"task": spec.task, "size": float(spec.size), "directory": spec.directory, **spec.train.get("data", {})}
    fields = {
        **spec.train,
        "optimizer": {**spec.train.get("optimizer", {}), **tuned, **spec.rates},
        "model": spec.model,
        "recipe": asdict(spec.recipe) if isinstance(spec.recipe, Recipe) else spec.recipe,
        "name": spec.arm,
        "seed": spec.seed,
        "data_order": spec.data_order,
        "placement_seed": spec.draw,
        "data": data,
        "output_dir": spec.run_dir,
    }
    return decode(TrainConfig, fields, where=f"study cell {spec.cell!r}")


def _evaluate_config(spec: CellSpec, task: str, size: str) -> EvaluateConfig:
    run = spec.reuse_run or (spec.run_dir if spec.recipe is not None else None)
    return EvaluateConfig(
        model=spec.model,
        task=task,
        size=float(size),
        directory=spec.directory,
        shots=spec.shots,
        allow_execution=spec.allow_execution,
        adapter=None if run is None else str(Path(run) / "adapter"),
        without_core=spec.reuse is not None,
        num_examples=spec.num_examples,
        batch_examples=512,
        name=spec.arm,
        seed=spec.seed,
    )


def _silent(message: str) -> None:
    """Cells run side by side; their messages are in their records."""
