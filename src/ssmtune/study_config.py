"""What a study declares, decoded from study.yaml."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ssmtune import config as decoding
from ssmtune.errors import ConfigError, nearest
from ssmtune.recipe import Recipe

RATES = ("learning_rate", "core_learning_rate", "state_learning_rate")
DECLARED = "declared"
"""The family that the plain list `comparisons` forms."""


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyTask:
    """One task of a study; `primary` is the outcome that comparisons are about."""

    name: str
    size: str
    primary: str


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class Tune:
    """Rates to choose from before the study, by the validation loss of runs with `seed`, which no cell may use.

    Several lists are tried in every combination. `task` trains those runs on one task for all; None on each cell's own.
    `train` overrides the training settings of those runs alone (fewer steps, say).
    """

    seed: int
    learning_rate: tuple[float, ...] = ()
    core_learning_rate: tuple[float, ...] = ()
    state_learning_rate: tuple[float, ...] = ()
    on: Literal["validation"] = "validation"
    task: str | None = None
    train: dict[str, pydantic.JsonValue] = field(default_factory=dict)

    def choices(self) -> list[dict[str, float]]:
        """Every combination of rates, by name."""
        given = {name: values for name, values in self._lists().items() if values}
        return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]

    def _lists(self) -> dict[str, tuple[float, ...]]:
        values = (self.learning_rate, self.core_learning_rate, self.state_learning_rate)
        return dict(zip(RATES, values, strict=True))

    def __post_init__(self) -> None:
        """Raise `ConfigError` where there is nothing to choose from."""
        if max(map(len, self._lists().values())) < 2 or any(len(set(v)) != len(v) for v in self._lists().values()):
            raise ConfigError(f"tune: got {self._lists()}; expected two or more different values of one of them.")


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyCell:
    """One arm: a recipe to train, another arm's trained run (`reuse`, its core discarded), or neither: the base.

    `draws` are seeds of a random placement: the arm is run once with each, and a comparison with it is one with what
    placements at random do. `models` restricts the arm to some of the study's models; None is all.
    `shots`: the base with that many solved examples before every question.
    """

    recipe: str | Recipe | None = None
    train: dict[str, pydantic.JsonValue] = field(default_factory=dict)
    reuse: str | None = None
    draws: tuple[int, ...] = ()
    models: tuple[str, ...] | None = None
    tune: Tune | None = None
    shots: int = pydantic.Field(default=0, ge=0)


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class Family:
    """Comparisons whose p-values are adjusted together. `on`: the task trained on, those of `transfer`, or tasks by name.

    `margin`: a difference that would not matter, for the statement that two arms are equivalent.
    """

    comparisons: tuple[tuple[str, str], ...]
    on: Literal["trained", "transfer"] | tuple[str, ...] = "trained"
    models: tuple[str, ...] | None = None
    margin: float | None = pydantic.Field(default=None, gt=0)


@pydantic_dataclass(frozen=True, kw_only=True, config=decoding.STRICT)
class StudyConfig:
    """The contents of study.yaml. Cells may override `train`; `workers: 0` runs in this process.

    Every cell runs on each of `models` (name -> location; `model` is one without a name), trains on each of `tasks` with
    every seed and every one of `data_orders`, and is evaluated on its task and on those of `transfer`.
    `retries`: how often a cell that failed is run again before the study goes on without it. `cell_seconds`: how long a
    cell may take before its worker is ended and the cell counts as failed.
    `directory` is where the sets of tasks lie; `allow_execution` lets tasks run the programs that models write.
    """

    name: str
    tasks: list[StudyTask]
    seeds: list[int]
    cells: dict[str, StudyCell]
    output_dir: str
    model: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    comparisons: list[tuple[str, str]] = field(default_factory=list)
    families: dict[str, Family] = field(default_factory=dict)
    transfer: list[StudyTask] = field(default_factory=list)
    data_orders: list[int] = field(default_factory=list)
    tune: Tune | None = None
    train: dict[str, pydantic.JsonValue] = field(default_factory=dict)
    num_examples: int | None = None
    workers: int = pydantic.Field(default=1, ge=0)
    retries: int = pydantic.Field(default=1, ge=0)
    cell_seconds: int | None = pydantic.Field(default=None, ge=1)
    directory: str | None = None
    allow_execution: bool = False

    def bases(self) -> dict[str, str]:
        """The base models, name -> location; a single `model` has the name ""."""
        return self.models or {"": self.model or ""}

    def all_families(self) -> dict[str, Family]:
        """The declared families, with the plain list of comparisons first."""
        plain = {DECLARED: Family(comparisons=tuple(self.comparisons))} if self.comparisons else {}
        return plain | self.families

    def evaluated(self, task: StudyTask) -> list[StudyTask]:
        """What a cell that trains on `task` is evaluated on: that task first."""
        return [task, *(other for other in self.transfer if other.name != task.name)]

    def models_of(self, cell: str) -> list[str]:
        """Names of the models that a cell runs on."""
        only = self.cells[cell].models
        return [name for name in self.bases() if only is None or name in only]

    def is_untrained(self, cell: str) -> bool:
        """Whether the arm is a base as it is, which has no seeds."""
        return self.cells[cell].recipe is None and self.cells[cell].reuse is None

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what contradicts itself."""
        where = f"study {self.name!r}"
        if (self.model is None) == (not self.models):
            raise ConfigError(f"{where}: got model={self.model!r}, models={self.models}; give exactly one of the two.")
        if self.cell_seconds is not None and self.workers == 0:
            raise ConfigError(
                f"{where}: cell_seconds: {self.cell_seconds} needs workers to end; give workers: 1 or more."
            )
        for label, values in (("tasks", self.tasks), ("seeds", self.seeds), ("cells", self.cells)):
            if not values:
                raise ConfigError(f"{where}, field '{label}': got nothing; expected at least one entry.")
        lists: dict[str, Sequence[Any]] = {
            "models": list(self.models.values()),
            "tasks": [task.name for task in self.tasks],
            "transfer": [task.name for task in self.transfer],
            "seeds": self.seeds,
            "data_orders": self.data_orders,
            **{f"families.{name}.comparisons": family.comparisons for name, family in self.families.items()},
            "comparisons": self.comparisons,
        }
        for label, entries in lists.items():
            if len(set(entries)) != len(entries):
                raise ConfigError(f"{where}, field '{label}': got {entries}; expected no entry twice.")
        _check_tasks(self)
        for name in self.models:
            _check_file_name(name, f"models.{name}", "model")
        for name, cell in self.cells.items():
            _check_cell(self, name, cell)
        if DECLARED in self.families and self.comparisons:
            raise ConfigError(
                f"{where}: 'comparisons' form the family {DECLARED!r}; give families.{DECLARED} another name."
            )
        for name, family in self.all_families().items():
            _check_family(self, name, family)


def _check_tasks(config: StudyConfig) -> None:
    own = {task.name: task for task in config.tasks}
    for task in config.transfer:
        if own.get(task.name, task) != task:
            raise ConfigError(
                f"transfer: {task.name!r} differs from the task of that name that is trained on; use one size and outcome."
            )


def _check_cell(config: StudyConfig, name: str, cell: StudyCell) -> None:
    _check_file_name(name, f"cells.{name}", "cell")
    _check_models(config, cell.models, f"cells.{name}.models")
    if cell.draws and (cell.recipe is None or len(set(cell.draws)) != len(cell.draws)):
        raise ConfigError(f"cells.{name}.draws: got {cell.draws}; expected different seeds of a recipe's placement.")
    tune = config.tune if cell.tune is None else cell.tune
    if tune is not None and tune.seed in config.seeds:
        raise ConfigError(
            f"cells.{name}: seed {tune.seed} of 'tune' is also one of 'seeds'. Choose one that no cell uses."
        )
    if tune is not None and tune.task is not None and tune.task not in (names := [t.name for t in config.tasks]):
        raise ConfigError(f"tune.task: no task is named {tune.task!r}; {nearest(tune.task, names)}.")
    if cell.tune is not None and cell.recipe is None:
        raise ConfigError(f"cells.{name}.tune: this cell trains nothing, so there is no rate to choose. Remove it.")
    if cell.shots and (cell.recipe is not None or cell.reuse is not None):
        raise ConfigError(f"cells.{name}: got 'shots' with a trained run; solved examples are for the base alone.")
    if cell.reuse is None:
        return
    _check_known(config, cell.reuse, f"cells.{name}.reuse")
    source = config.cells[cell.reuse]
    if cell.recipe is not None or cell.train:
        raise ConfigError(
            f"cells.{name}: got 'reuse' with 'recipe' or 'train'; a reused run is not trained. Remove one."
        )
    if source.recipe is None:
        raise ConfigError(f"cells.{name}.reuse: {cell.reuse!r} trains nothing; name a cell that has a recipe.")
    if source.draws or not set(config.models_of(name)) <= set(config.models_of(cell.reuse)):
        raise ConfigError(f"cells.{name}.reuse: {cell.reuse!r} has draws or lacks a model; name a cell without either.")


def _check_family(config: StudyConfig, name: str, family: Family) -> None:
    where = "comparisons" if name == DECLARED and config.comparisons else f"families.{name}.comparisons"
    if not family.comparisons:
        raise ConfigError(f"{where}: got nothing; expected at least one pair of cells.")
    for pair in family.comparisons:
        for cell in pair:
            _check_known(config, cell, f"{where} {list(pair)}")
        if pair[0] == pair[1]:
            raise ConfigError(
                f"study {config.name!r}: comparison {list(pair)} names one cell twice; expected two cells."
            )
    _check_models(config, family.models, f"families.{name}.models")
    evaluated = {task.name for task in (*config.tasks, *config.transfer)}
    for task in family.on if isinstance(family.on, tuple) else ():
        if task not in evaluated:
            raise ConfigError(f"families.{name}.on: no task is named {task!r}; {nearest(task, evaluated)}.")
    if family.on == "transfer" and not config.transfer:
        raise ConfigError(f"families.{name}.on: the study declares no 'transfer'. Add its tasks, or write 'trained'.")


def _check_known(config: StudyConfig, name: str, where: str) -> None:
    if name not in config.cells:
        raise ConfigError(f"{where}: no cell is named {name!r}; {nearest(name, config.cells)}.")


def _check_models(config: StudyConfig, names: Sequence[str] | None, where: str) -> None:
    for name in names or ():
        if name not in config.models:
            raise ConfigError(f"{where}: no model is named {name!r}; {nearest(name, config.models)}.")


def _check_file_name(name: str, where: str, what: str) -> None:
    if not name.replace("_", "").replace("+", "").replace(".", "").isalnum():
        raise ConfigError(f"{where}: a {what}'s name becomes a file name; use letters, digits, '_', '+' and '.' only.")
