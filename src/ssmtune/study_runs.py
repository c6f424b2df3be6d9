"""What a study cell does: train a recipe and evaluate it, evaluate another cell's run without its core, or the base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ssmtune.config import decode
from ssmtune.evaluate import EvaluateConfig, evaluate
from ssmtune.models import model_location
from ssmtune.records import file_sha256
from ssmtune.study_cells import CellSpec, StudyConfig
from ssmtune.tasks.base import Side, SidedTask, get_task
from ssmtune.train import TrainConfig, train
from ssmtune.training_data import catalogue_digest, task_sources


def run_cell(spec: CellSpec) -> dict[str, Any]:
    """Return {"train": record or None, "evaluate": record} of one cell; its run directory stays below the study's."""
    train_record = None
    if spec.recipe is not None:
        run_dir = _run_dir(spec, spec.cell)
        train_record = train(_train_config(spec, run_dir), on_message=_silent, progress=False)
        # Only the restored adapter is needed from here on, and a study has many runs.
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    evaluation = evaluate(_evaluate_config(spec), progress=False)
    return {"train": train_record, "evaluate": evaluation}


def study_inputs(config: StudyConfig) -> dict[str, str]:
    """Digests of what a study only names: the base model's weights and the tasks' versions."""
    location = Path(model_location(config.model))
    weights = sorted(location.glob("*.safetensors")) if location.is_dir() else []
    inputs = {f"model/{path.name}": file_sha256(path) for path in weights}
    inputs["catalogue"] = catalogue_digest()
    for task in config.tasks:
        if isinstance(get_task(task.name), SidedTask):
            sides: tuple[Side, ...] = ("train", "test") if _trains(config) else ("test",)
            for side in sides:
                inputs |= task_sources(task.name, side, config.directory)
    return inputs | {f"task/{task.name}": str(get_task(task.name).version) for task in config.tasks}


def _trains(config: StudyConfig) -> bool:
    return any(cell.recipe is not None or cell.shots for cell in config.cells.values())


def _run_dir(spec: CellSpec, cell: str) -> Path:
    return Path(spec.output_dir) / "runs" / f"{cell}-{spec.task}-seed{spec.seed}"


def _train_config(spec: CellSpec, run_dir: Path) -> TrainConfig:
    data = {"task": spec.task, "size": float(spec.size), "directory": spec.directory, **spec.train.get("data", {})}
    fields = {
        **spec.train,
        "model": spec.model,
        "recipe": spec.recipe,
        "name": spec.cell,
        "seed": spec.seed,
        "data": data,
        "output_dir": str(run_dir),
    }
    return decode(TrainConfig, fields, where=f"study cell {spec.cell!r}")


def _evaluate_config(spec: CellSpec) -> EvaluateConfig:
    source = spec.reuse or (spec.cell if spec.recipe is not None else None)
    return EvaluateConfig(
        model=spec.model,
        task=spec.task,
        size=float(spec.size),
        directory=spec.directory,
        shots=spec.shots,
        allow_execution=spec.allow_execution,
        adapter=None if source is None else str(_run_dir(spec, source) / "adapter"),
        without_core=spec.reuse is not None,
        num_examples=spec.num_examples,
        batch_examples=512,
        name=spec.cell,
        seed=spec.seed,
    )


def _silent(message: str) -> None:
    """Cells run side by side; their messages are in their records."""
