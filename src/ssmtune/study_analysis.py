"""The study record: arms with intervals and the declared comparisons, from the records of done cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydantic

from ssmtune import records, stats
from ssmtune.errors import RecordError, nearest
from ssmtune.study_cells import Cell, expand
from ssmtune.study_config import Family, StudyConfig


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Where arms are compared: one model, one task trained on, one task evaluated on with its primary outcome."""

    model: str
    trained_on: str
    evaluated_on: str
    size: str
    primary: str

    @property
    def name(self) -> str:
        """What tables call it: the task, with the one trained on where that differs, and the model where there are several."""
        task = self.evaluated_on if not self.is_transfer else f"{self.trained_on} -> {self.evaluated_on}"
        return f"{self.model}: {task}" if self.model else task

    @property
    def is_transfer(self) -> bool:
        """Whether what is evaluated was not trained on."""
        return self.trained_on != self.evaluated_on

    def facts(self) -> dict[str, Any]:
        """What a table or comparison says of it."""
        return {"model": self.model, "trained_on": self.trained_on, "evaluated_on": self.evaluated_on}


Run = tuple[int | None, int | None, int]
"""(draw, data order, seed); an untrained base has the run (None, None, first seed)."""

Done = Mapping[tuple[str, str, str, str], Mapping[Run, Mapping[str, Any]]]
"""(model, cell, task trained on, task evaluated on) -> evaluate record of each run; a base is trained on ""."""


def panels(config: StudyConfig) -> list[Panel]:
    """Return the panels of a study: the tasks trained on first, then the transfer."""
    found = [
        Panel(model=model, trained_on=task.name, evaluated_on=other.name, size=other.size, primary=other.primary)
        for model in config.bases()
        for task in config.tasks
        for other in config.evaluated(task)
    ]
    return sorted(found, key=lambda panel: panel.is_transfer)


def declared(config: StudyConfig, family: Family) -> list[tuple[Panel, str, str]]:
    """Return the comparisons of a family: (panel, arm, baseline) wherever both run on the panel's model."""
    return [
        (panel, arm, baseline)
        for panel in panels(config)
        if (
            panel.is_transfer == (family.on == "transfer")
            if isinstance(family.on, str)
            else panel.evaluated_on in family.on
        )
        and (family.models is None or panel.model in family.models)
        for arm, baseline in family.comparisons
        if panel.model in config.models_of(arm) and panel.model in config.models_of(baseline)
    ]


def num_comparisons(config: StudyConfig) -> int:
    """How many comparisons a study declares, over all families."""
    return sum(len(declared(config, family)) for family in config.all_families().values())


def analyse(
    cells: Sequence[Mapping[str, Any]], config: StudyConfig, *, inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the study record: arms with intervals, declared comparisons, failures. Only done records enter a figure.

    Records of another digest than the config expands to are ignored, so cells of an earlier config never mix in.
    """
    expected = expand(config, inputs=inputs)
    by_digest = {record["digest"]: record for record in cells}
    found = [(cell, by_digest[cell.digest]) for cell in expected if cell.digest in by_digest]
    done = _done(config, found)
    left_out = [
        {
            "name": c.spec.arm,
            "task": c.spec.task,
            "seed": c.spec.seed,
            "status": record["status"],
            "error": record["error"],
        }
        for c, record in found
        if record["status"] != "done"
    ]
    comparisons = [
        c for name, family in config.all_families().items() for c in _comparisons(config, name, family, done)
    ]
    sizes = {name: len(declared(config, family)) for name, family in config.all_families().items()}
    statuses = [record["status"] for _, record in found]
    registrations = [record.get("preregistration") for _, record in found]
    mixed = _tasks_of_mixed_code(found)
    complete = statuses.count("done") == len(expected) and not mixed
    return records.new_record(
        "study",
        config=pydantic.TypeAdapter(StudyConfig).dump_python(config, mode="json"),
        status="done" if complete else "provisional",
        name=config.name,
        arms=list(dict.fromkeys(cell.spec.arm for cell in expected)) if config.models else list(config.cells),
        tasks=[_table(config, panel, done) for panel in panels(config)],
        comparisons=[comparison.to_dict() for comparison in comparisons],
        num_comparisons=sum(sizes.values()),
        families=[
            {"name": name, "num_comparisons": sizes[name], "on": family.on, "margin": family.margin}
            for name, family in config.all_families().items()
        ],
        minimum_detectable_effect=[
            {
                "arm": c.arm,
                "baseline": c.baseline,
                "task": c.task,
                "effect": stats.resolvable_effect(c.result, num_comparisons=sizes[c.family]),
            }
            for c in comparisons
        ],
        tuned=[
            {"name": c.spec.arm, "task": c.spec.task, "rates": record["tuned"], "seed": c.spec.seed}
            for c, record in found
            if record.get("tuned")
        ],
        method=stats.METHOD,
        preregistrations={str(p): registrations.count(p) for p in dict.fromkeys(registrations) if p is not None},
        num_cells={"expected": len(expected), **{status: statuses.count(status) for status in sorted(set(statuses))}},
        num_failed_attempts=sum(len(record.get("failed_attempts", ())) for _, record in found),
        missing=[cell.path.name for cell in expected if cell.digest not in by_digest],
        failures=left_out,
        mixed_code=mixed,
    )


def _done(config: StudyConfig, found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> Done:
    done: dict[tuple[str, str, str, str], dict[Run, Mapping[str, Any]]] = {}
    for cell, record in found:
        spec = cell.spec
        if record["status"] != "done" or record.get("evaluate") is None:
            continue
        trained_on = "" if config.is_untrained(spec.cell) else spec.task
        evaluations = [(spec.task, record["evaluate"])]
        evaluations += zip((task.name for task in spec.transfer), record.get("transfer", ()), strict=True)
        for task, evaluation in evaluations:
            runs = done.setdefault((spec.model_name, spec.cell, trained_on, task), {})
            runs[spec.draw, spec.data_order, spec.seed] = evaluation
    return done


def _runs(config: StudyConfig, panel: Panel, cell: str, done: Done) -> Mapping[Run, Mapping[str, Any]]:
    trained_on = "" if config.is_untrained(cell) else panel.trained_on
    return done.get((panel.model, cell, trained_on, panel.evaluated_on), {})


def _tasks_of_mixed_code(found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> list[str]:
    """Tasks whose done cells ran different sources: their differences may be the code's, so the study is provisional."""
    codes: dict[str, set[str | None]] = {}
    for cell, record in found:
        if record["status"] == "done":
            codes.setdefault(cell.spec.task, set()).add(record.get("environment", {}).get("code"))
    return sorted(task for task, different in codes.items() if len(different) > 1)


def _table(config: StudyConfig, panel: Panel, done: Done) -> dict[str, Any]:
    arms = []
    for name in config.cells:
        evaluations = list(_runs(config, panel, name, done).values())
        if not evaluations:
            continue
        metrics = {}
        for metric in evaluations[0]["metrics"]:
            interval, over, values = metric_interval(evaluations, metric)
            metrics[metric] = {**interval.to_dict(), "over": over, "values": values}
        seeds = len({evaluation["seed"] for evaluation in evaluations})
        arms.append({"name": name, "num_seeds": seeds, "num_runs": len(evaluations), "metrics": metrics})
    return {"task": panel.name, **panel.facts(), "size": panel.size, "primary": panel.primary, "arms": arms}


def metric_interval(evaluations: Sequence[Mapping[str, Any]], metric: str) -> tuple[stats.Interval, str, list[float]]:
    """Return mean and interval, what it ranges over ("seeds", or "examples" for one run), and each seed's value.

    A seed's value is the mean over its data orders and draws.
    """
    by_seed: dict[Any, list[float]] = {}
    for index, evaluation in enumerate(evaluations):
        by_seed.setdefault(evaluation.get("seed", index), []).append(float(evaluation["metrics"][metric]))
    values = [float(np.mean(own)) for own in by_seed.values()]
    if len(values) > 1:
        # Student's interval of a share near 0 or 1 reaches beyond what a share can be.
        interval = stats.mean_interval(values)
        return (stats.clipped(interval) if all(0 <= v <= 1 for v in values) else interval), "seeds", values
    scores = evaluations[0]["scores"].get(metric) if len(evaluations) == 1 else None
    return (stats.example_interval(scores) if scores else stats.mean_interval(values)), "examples", values


def _comparisons(config: StudyConfig, name: str, family: Family, done: Done) -> list[stats.Comparison]:
    """The comparisons of a family that have data, with Holm's adjustment over all; a missing one counts as p = 1."""
    made = []
    asked = declared(config, family)
    for panel, arm, baseline in asked:
        result = _paired(config, panel, arm, baseline, done)
        if result is not None:
            made.append(
                stats.Comparison(
                    arm=arm,
                    baseline=baseline,
                    task=panel.name,
                    metric=panel.primary,
                    result=result,
                    family=name,
                    margin=family.margin,
                    **panel.facts(),
                )
            )
    adjusted = stats.holm([comparison.result.p for comparison in made] + [1.0] * (len(asked) - len(made)))
    return [replace(comparison, p_holm=p) for comparison, p in zip(made, adjusted, strict=False)]


def _paired(config: StudyConfig, panel: Panel, arm: str, baseline: str, done: Done) -> stats.Difference | None:
    sides = [_runs(config, panel, name, done) for name in (arm, baseline)]
    trained = [not config.is_untrained(name) for name in (arm, baseline)]
    wanted = [
        [(draw, order) for draw in config.cells[name].draws or (None,) for order in config.data_orders or (None,)]
        for name in (arm, baseline)
    ]
    # A seed counts when all of its runs are there, on both sides.
    seeds = [
        seed
        for seed in config.seeds
        if all(
            (draw, order, seed) in runs
            for runs, own, is_run in zip(sides, wanted, trained, strict=True)
            if is_run
            for draw, order in own
        )
    ]
    kept: list[list[list[Mapping[str, Any]]]] = []
    for runs, own, is_run in zip(sides, wanted, trained, strict=True):
        kept.append(
            [[runs[draw, order, seed] for seed in seeds] for draw, order in own] if is_run else [list(runs.values())]
        )
    if not kept[0][0] or not kept[1][0]:
        return None
    if kept[0][0][0]["example_ids"] != kept[1][0][0]["example_ids"]:
        raise RecordError(
            f"{panel.name}: {arm} and {baseline} were evaluated on different examples, so they cannot be paired."
        )
    # [draws, orders, seeds, examples]
    scores = []
    for side, own, name in zip(kept, wanted, (arm, baseline), strict=True):
        rows = np.stack([score_array(runs, panel.primary) for runs in side])
        num_draws = max(1, len(config.cells[name].draws)) if len(side) == len(own) else 1
        scores.append(rows.reshape(num_draws, len(rows) // num_draws, *rows.shape[1:]))
    is_null = all(trained) and sorted(len(side) > 1 for side in scores) == [False, True]
    return stats.paired_difference(scores[0], scores[1], seed=0, is_null=is_null)


def score_array(evaluations: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return scores as `[seeds, examples]`. Raises `RecordError` when examples differ or `metric` is missing."""
    first = evaluations[0]
    for evaluation in evaluations:
        where = f"evaluation of {evaluation.get('name')!r} on {evaluation.get('task')!r}, seed {evaluation.get('seed')}"
        if metric not in evaluation["scores"]:
            raise RecordError(f"{where}: no scores of {metric!r}; {nearest(metric, evaluation['scores'])}.")
        if evaluation["example_ids"] != first["example_ids"] or len(evaluation["scores"][metric]) != len(
            first["example_ids"]
        ):
            raise RecordError(
                f"{where}: its examples are not those of the first seed. Evaluate all arms on the same data."
            )
    return np.asarray([evaluation["scores"][metric] for evaluation in evaluations], dtype=np.float64)
