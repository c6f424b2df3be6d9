"""What a study declares, decoded from study.yaml, and the cells it expands to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ssmtune import config as decoding
from ssmtune import records
from ssmtune.errors import ConfigError, nearest


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyTask:
    """One task of a study; `primary` is the outcome that comparisons are about."""

    name: str
    size: str
    primary: str


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyCell:
    """One arm: a recipe to train, another arm's trained run (`reuse`, its core discarded), or neither: the base.

    `shots`: the base with that many solved examples before every question.
    """

    recipe: str | None = None
    train: dict[str, pydantic.JsonValue] = field(default_factory=dict)
    reuse: str | None = None
    shots: int = pydantic.Field(default=0, ge=0)


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyConfig:
    """The contents of study.yaml. Cells may override `train`; `workers: 0` runs in this process.

    `directory` is where the sets of tasks lie; `allow_execution` lets tasks run the programs that models write.
    """

    name: str
    model: str
    tasks: list[StudyTask]
    seeds: list[int]
    cells: dict[str, StudyCell]
    comparisons: list[tuple[str, str]]
    output_dir: str
    train: dict[str, pydantic.JsonValue] = field(default_factory=dict)
    num_examples: int | None = None
    workers: int = 1
    directory: str | None = None
    allow_execution: bool = False

    def __post_init__(self) -> None:
        for name, values in (("tasks", self.tasks), ("seeds", self.seeds), ("cells", self.cells)):
            if not values:
                raise ConfigError(f"study {self.name!r}, field '{name}': got nothing; expected at least one entry.")
        names = [task.name for task in self.tasks]
        for label, entries in (("tasks", names), ("seeds", self.seeds), ("comparisons", self.comparisons)):
            if len(set(entries)) != len(entries):
                raise ConfigError(f"study {self.name!r}, field '{label}': got {entries}; expected no entry twice.")
        for name, cell in self.cells.items():
            self._check_cell(name, cell)
        for pair in self.comparisons:
            for name in pair:
                self._check_known(name, f"comparisons {list(pair)}")
            if pair[0] == pair[1]:
                raise ConfigError(
                    f"study {self.name!r}: comparison {list(pair)} names one cell twice; expected two cells."
                )

    def _check_cell(self, name: str, cell: StudyCell) -> None:
        if not name.replace("_", "").replace("+", "").replace(".", "").isalnum():
            raise ConfigError(
                f"cells.{name}: a cell's name becomes a file name; use letters, digits, '_', '+' and '.' only."
            )
        if cell.shots and (cell.recipe is not None or cell.reuse is not None):
            raise ConfigError(f"cells.{name}: got 'shots' with a trained run; solved examples are for the base alone.")
        if cell.reuse is None:
            return
        self._check_known(cell.reuse, f"cells.{name}.reuse")
        if cell.recipe is not None or cell.train:
            raise ConfigError(
                f"cells.{name}: got 'reuse' with 'recipe' or 'train'; a reused run is not trained. Remove one."
            )
        if self.cells[cell.reuse].recipe is None:
            raise ConfigError(f"cells.{name}.reuse: {cell.reuse!r} trains nothing; name a cell that has a recipe.")

    def _check_known(self, name: str, where: str) -> None:
        if name not in self.cells:
            raise ConfigError(f"{where}: no cell is named {name!r}; {nearest(name, self.cells)}.")


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """What one cell runs. `reuse_record`: the record of the done cell whose run is evaluated without its core."""

    cell: str
    model: str
    task: str
    size: str
    primary: str
    seed: int
    recipe: str | None
    train: dict[str, Any]
    num_examples: int | None
    reuse: str | None
    output_dir: str
    reuse_record: str | None = None
    directory: str | None = None
    shots: int = 0
    allow_execution: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A spec, the digest of everything that determines it, its record file, and the digest of the cell it waits for."""

    spec: CellSpec
    digest: str
    path: Path
    needs: str | None = None


def expand(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> list[Cell]:
    """Return the cells in running order: those that others reuse first, the untrained base at the first seed only.

    `inputs` are digests of what the config only names (model weights, data); they enter every cell's digest.
    """
    order = sorted(config.cells, key=lambda name: config.cells[name].reuse is not None)
    cells: dict[tuple[str, str, int], Cell] = {}
    for task in config.tasks:
        for seed in config.seeds:
            for name in order:
                arm = config.cells[name]
                if arm.recipe is None and arm.reuse is None and seed != config.seeds[0]:
                    continue
                source = cells[(arm.reuse, task.name, seed)] if arm.reuse else None
                cells[(name, task.name, seed)] = _cell(config, task, seed, name, source, dict(inputs or {}))
    return list(cells.values())


def _cell(
    config: StudyConfig, task: StudyTask, seed: int, name: str, source: Cell | None, inputs: dict[str, str]
) -> Cell:
    arm = config.cells[name]
    spec = CellSpec(
        cell=name,
        model=config.model,
        task=task.name,
        size=task.size,
        primary=task.primary,
        seed=seed,
        recipe=arm.recipe,
        train={**config.train, **arm.train} if arm.recipe is not None else {},
        num_examples=config.num_examples,
        reuse=arm.reuse,
        output_dir=config.output_dir,
        reuse_record=str(source.path) if source else None,
        directory=config.directory,
        shots=arm.shots,
        allow_execution=config.allow_execution,
    )
    # Places, permissions and the choice of outcome do not change what is computed; a cell without shots is as it was.
    unused = ["output_dir", "reuse", "reuse_record", "primary", "directory", "allow_execution"]
    unused += [] if spec.shots else ["shots"]
    determines = {k: v for k, v in asdict(spec).items() if k not in unused}
    digest = records.digest({**determines, "inputs": inputs, "reuse": source.digest if source else None})
    path = Path(config.output_dir) / "cells" / f"{name}-{task.name}-seed{seed}.json.gz"
    return Cell(spec=spec, digest=digest, path=path, needs=source.digest if source else None)
