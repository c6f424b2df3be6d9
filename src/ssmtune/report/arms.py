"""Records sorted into arms and tasks: what the sections of a report are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ssmtune import records, stats
from ssmtune.errors import RecordError
from ssmtune.report import plots
from ssmtune.study import score_array

Record = Mapping[str, Any]
BASE = "base"


@dataclass(frozen=True)
class Arm:
    """One arm: how it is drawn, its training records, and its done evaluations per task, in order of seed."""

    style: plots.Style
    train: list[Record] = field(default_factory=list)
    evaluations: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The arm's name in every table and figure."""
        return self.style.name


@dataclass(frozen=True)
class Collection:
    """What a report shows: arms (base first), the primary outcome of each task, studies, and every record read."""

    arms: dict[str, Arm]
    tasks: dict[str, str]
    studies: list[Record]
    sources: list[Record]


def collect(given: Iterable[Record]) -> Collection:
    """Return records by arm and task. Study cells are opened; doubles count once; failed ones are listed."""
    sources = _opened(given)
    kept = sorted((r for r in sources if r["kind"] in ("train", "evaluate")), key=_order)
    names = list(dict.fromkeys(_name(r) for r in kept))
    declared = [name for study in sources if study["kind"] == "study" for name in study["arms"] if name in names]
    names = list(dict.fromkeys([n for n in (BASE,) if n in names] + declared + names))
    styles = plots.arm_styles(names, BASE)
    arms = {name: Arm(styles[name]) for name in names}
    tasks: dict[str, str] = {}
    for record in kept:
        arm = arms[_name(record)]
        if record["kind"] == "train" and record["status"] in ("done", "provisional"):
            arm.train.append(record)
        elif record["kind"] == "evaluate" and record["status"] == "done":
            arm.evaluations.setdefault(record["task"], []).append(record)
            tasks.setdefault(record["task"], record["primary"])
    return Collection(arms, tasks, [r for r in sources if r["kind"] == "study"], sources)


def _opened(given: Iterable[Record]) -> list[Record]:
    """Single records in place of study cells that hold them; a cell that holds none stays itself."""
    found: dict[str, Record] = {}
    for record in given:
        inner = [record.get(k) for k in ("train", "evaluate")] if record["kind"] == "study_cell" else [record]
        named: list[Record] = [{"name": record.get("name"), **r} for r in inner if r is not None]
        for one in named or [record]:
            found.setdefault(records.digest(one), one)
    return list(found.values())


def _name(record: Record) -> str:
    return str(record.get("name") or record["config"].get("recipe") or BASE)


def _order(record: Record) -> tuple[str, int]:
    return task_of(record), int(record["config"].get("seed", 0))


def task_of(record: Record) -> str:
    """The task that a record is about; "training" for a run on somebody's own data."""
    config = record["config"]
    return str(record.get("task") or config.get("data", {}).get("task") or config.get("task") or "training")


def is_share(evaluations: Iterable[Record], metric: str) -> bool:
    """Return whether every value of `metric` lies in 0..1, so that it is written in percent."""
    return all(0.0 <= float(e["metrics"][metric]) <= 1.0 for e in evaluations)


def base_comparisons(collection: Collection) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the comparison of each (arm, task) with the base, as `Comparison.to_dict` plus `declared`.

    A comparison declared by a study is taken from it; the others are computed here and adjusted among themselves.
    """
    declared = {(c["arm"], c["task"]): c for s in collection.studies for c in s["comparisons"] if c["baseline"] == BASE}
    made = []
    for task, metric in collection.tasks.items():
        for arm in collection.arms.values():
            if arm.name != BASE and (arm.name, task) not in declared:
                result = _against_base(collection, arm, task, metric)
                if result is not None:
                    made.append(stats.Comparison(arm=arm.name, baseline=BASE, task=task, metric=metric, result=result))
    adjusted = stats.holm([c.result.p for c in made])
    computed = {(c.arm, c.task): replace(c, p_holm=p).to_dict() for c, p in zip(made, adjusted, strict=True)}
    return {
        **{key: {**c, "declared": False} for key, c in computed.items()},
        **{key: {**c, "declared": True} for key, c in declared.items()},
    }


def _against_base(collection: Collection, arm: Arm, task: str, metric: str) -> stats.Difference | None:
    """The paired difference to the base on common seeds; None where the two cannot be paired."""
    base = collection.arms[BASE].evaluations.get(task, []) if BASE in collection.arms else []
    own = arm.evaluations.get(task, [])
    if len(base) > 1:
        common = {e["seed"] for e in base} & {e["seed"] for e in own}
        base, own = ([e for e in side if e["seed"] in common] for side in (base, own))
    if not base or not own or base[0]["example_ids"] != own[0]["example_ids"] or len(own[0]["example_ids"]) < 2:
        return None
    try:
        return stats.paired_difference(score_array(own, metric), score_array(base, metric), seed=0)
    except RecordError:
        return None
