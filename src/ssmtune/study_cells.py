"""The cells that a study expands to: what each one runs, where its record goes, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from ssmtune import records
from ssmtune.recipe import Recipe
from ssmtune.study_config import StudyConfig, StudyTask, Tune


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """What one cell runs: trains `recipe` on `task` and evaluates the result there and on `transfer`.

    `reuse_run`: the run that is evaluated without its core. `rates`: what a tuning run tries; it is not evaluated.
    `tuning`: records of tuning runs, of which the best one's rates are taken.
    """

    cell: str
    model: str
    task: str
    size: str
    primary: str
    seed: int
    recipe: str | Recipe | None
    train: dict[str, Any]
    num_examples: int | None
    reuse: str | None
    output_dir: str
    run_dir: str
    reuse_run: str | None = None
    model_name: str = ""
    transfer: tuple[StudyTask, ...] = ()
    data_order: int | None = None
    draw: int | None = None
    rates: dict[str, float] = field(default_factory=dict)
    tuning: tuple[str, ...] = ()
    directory: str | None = None
    shots: int = 0
    allow_execution: bool = False

    @property
    def arm(self) -> str:
        """The cell's name, with that of its model where the study has several."""
        return f"{self.model_name}: {self.cell}" if self.model_name else self.cell


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A spec, the digest of everything that determines it, its record file, and the digests of the cells it waits for."""

    spec: CellSpec
    digest: str
    path: Path
    needs: tuple[str, ...] = ()


def expand(config: StudyConfig, *, inputs: Mapping[str, str] | None = None) -> list[Cell]:
    """Return the cells in running order: a model's tuning runs, those that others reuse, the rest.

    An untrained base has one cell per task that anything is evaluated on, at the first seed. `inputs` are digests of what
    the config only names: "model/NAME/..." enters the digests of that model's cells, "task/NAME" those of cells that
    train or are evaluated on it, any other every cell's.
    """
    order = sorted(config.cells, key=lambda name: config.cells[name].reuse is not None)
    found = dict(inputs or {})
    cells: list[Cell] = []
    for model in config.bases():
        members = [name for name in order if model in config.models_of(name)]
        for name in members:
            if config.is_untrained(name):
                tasks = {task.name: task for task in (*config.tasks, *config.transfer)}
                cells += [_cell(config, found, model, name, task, config.seeds[0]) for task in tasks.values()]
        trained = [name for name in members if not config.is_untrained(name)]
        for task in config.tasks:
            tuning = {name: _tuning_cells(config, found, model, name, task) for name in trained}
            cells += [cell for runs in tuning.values() for cell in runs]
            for seed in config.seeds:
                for data_order in config.data_orders or (None,):
                    sources: dict[str, Cell] = {}
                    for name in trained:
                        for draw in config.cells[name].draws or (None,):
                            one = _cell(config, found, model, name, task, seed, data_order=data_order, draw=draw)
                            reused = config.cells[name].reuse
                            sources[name] = _waiting(one, tuning[name], sources[reused] if reused else None)
                            cells.append(sources[name])
    # Tuning runs on one task for all are the same for every task.
    return list({cell.digest: cell for cell in cells}.values())


def _cell(
    config: StudyConfig,
    inputs: Mapping[str, str],
    model: str,
    name: str,
    task: StudyTask,
    seed: int,
    *,
    data_order: int | None = None,
    draw: int | None = None,
) -> Cell:
    arm = config.cells[name]
    # A task of somebody's own has a module before its name, and ":" is no part of a file's name everywhere.
    called = task.name.replace(":", ".")
    label = "-".join(
        [
            *([model] if model else []),
            f"{name}-{called}-seed{seed}",
            *(f"{axis}{value}" for axis, value in (("order", data_order), ("draw", draw)) if value is not None),
        ]
    )
    spec = CellSpec(
        cell=name,
        model=config.bases()[model],
        model_name=model,
        task=task.name,
        size=task.size,
        primary=task.primary,
        transfer=() if config.is_untrained(name) else tuple(config.evaluated(task)[1:]),
        seed=seed,
        data_order=data_order,
        draw=draw,
        recipe=arm.recipe,
        train={**config.train, **arm.train} if arm.recipe is not None else {},
        num_examples=config.num_examples,
        reuse=arm.reuse,
        output_dir=config.output_dir,
        run_dir="",
        directory=config.directory,
        shots=arm.shots,
        allow_execution=config.allow_execution,
    )
    return _placed(spec, _relevant(inputs, spec), Path(config.output_dir) / "cells" / f"{label}.json.gz")


def _tuning_cells(config: StudyConfig, inputs: Mapping[str, str], model: str, name: str, task: StudyTask) -> list[Cell]:
    """The tuning runs of an arm on a model: one per choice of rates, none where nothing is to be chosen."""
    tune: Tune | None = config.cells[name].tune or config.tune
    if tune is None or config.cells[name].recipe is None:
        return []
    task = next((other for other in config.tasks if other.name == tune.task), task)
    draw = next(iter(config.cells[name].draws), None)
    one = _cell(config, inputs, model, name, task, tune.seed, draw=draw)
    train = {**one.spec.train, **tune.train}
    made = []
    for rates in tune.choices():
        words = "-".join(f"{rate.removesuffix('_rate')}{value:g}" for rate, value in rates.items())
        path = Path(config.output_dir) / "tuning" / f"{one.path.name.removesuffix('.json.gz')}-{words}.json.gz"
        spec = replace(one.spec, train=train, rates=rates, transfer=())
        made.append(_placed(spec, _relevant(inputs, spec), path))
    return made


def _waiting(cell: Cell, tuning: list[Cell], source: Cell | None) -> Cell:
    """The cell with what it waits for: its digest holds theirs, since their outcome decides its own."""
    needs = [*tuning, *([source] if source else [])]
    if not needs:
        return cell
    spec = replace(
        cell.spec, tuning=tuple(str(run.path) for run in tuning), reuse_run=source.spec.run_dir if source else None
    )
    given = {"own": cell.digest, "needs": [other.digest for other in needs]}
    return replace(_placed(spec, given, cell.path), needs=tuple(other.digest for other in needs))


def _placed(spec: CellSpec, inputs: Mapping[str, Any], path: Path) -> Cell:
    # Places, names, permissions and the choice of outcome do not change what is computed; an unused axis adds nothing.
    unused: dict[str, Any] = {"data_order": None, "draw": None, "transfer": [], "rates": {}, "shots": 0}
    plain: dict[str, Any] = pydantic.TypeAdapter(CellSpec).dump_python(spec, mode="json")
    places = (
        "output_dir",
        "run_dir",
        "reuse",
        "reuse_run",
        "primary",
        "model_name",
        "tuning",
        "directory",
        "allow_execution",
    )
    determines = {k: v for k, v in plain.items() if k not in places and unused.get(k, ...) != v}
    digest = records.digest({**determines, "inputs": dict(inputs)})
    # The digest in its name keeps a run of an earlier config from being taken for this one's.
    run_dir = Path(spec.output_dir) / "runs" / f"{path.name.removesuffix('.json.gz')}-{digest[:8]}"
    return Cell(spec=replace(spec, run_dir=str(run_dir)), digest=digest, path=path)


def _relevant(inputs: Mapping[str, str], spec: CellSpec) -> dict[str, str]:
    tasks = {spec.task, *(task.name for task in spec.transfer)}

    def concerns(key: str) -> bool:
        kind, _, rest = key.partition("/")
        if kind == "model" and spec.model_name:
            return rest.startswith(f"{spec.model_name}/")
        return kind != "task" or rest in tasks

    return {key: value for key, value in inputs.items() if concerns(key)}
