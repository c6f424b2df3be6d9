"""Records sorted into arms and panels: what the sections of a report are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ssmtune import stats
from ssmtune.errors import RecordError
from ssmtune.report import plots
from ssmtune.report.sources import Record, Source, open_sources
from ssmtune.report.tables import Cell
from ssmtune.study import score_array

Compared = Mapping[tuple[str, str], Mapping[str, Any]]
"""(arm, panel) -> its comparison with one base."""


@dataclass(frozen=True)
class Panel:
    """Where arms are compared: one model, one task trained on, one evaluated on, and its primary outcome."""

    model: str
    trained_on: str
    evaluated_on: str
    primary: str

    @property
    def name(self) -> str:
        """What tables call it: the task, the one trained on before it where that differs, the model of several first."""
        task = f"{self.trained_on} -> {self.evaluated_on}" if self.is_transfer else self.evaluated_on
        return f"{self.model}: {task}" if self.model else task

    @property
    def is_transfer(self) -> bool:
        """Whether what is evaluated was not trained on."""
        return self.trained_on != self.evaluated_on


@dataclass(frozen=True)
class Arm:
    """One arm: how it is drawn, whether it is a base as it is, its training records, its done evaluations per panel.

    `reused` is the arm whose runs it evaluates, where it has none of its own.
    """

    style: plots.Style
    untrained: bool
    train: list[Source] = field(default_factory=list)
    evaluations: dict[str, list[Source]] = field(default_factory=dict)
    reused: Arm | None = None

    @property
    def name(self) -> str:
        """The arm's name in every table and figure."""
        return self.style.name

    def plan(self, model: str) -> Source | None:
        """A training record of the arm on `model` that holds its plan, or of the arm whose runs it reuses."""
        own = next((s for s in self.train if s.model == model and s.record.get("plan")), None)
        return own if own is not None or self.reused is None else self.reused.plan(model)


@dataclass(frozen=True)
class Collection:
    """What a report shows: arms (bases first), panels by name, studies, and every record read."""

    arms: dict[str, Arm]
    panels: dict[str, Panel]
    studies: list[Source]
    sources: list[Source]

    def of(self, *kinds: str) -> list[Source]:
        """The records of these kinds, whatever their status."""
        return [s for s in self.sources if s.record["kind"] in kinds]

    def key(self, name: str) -> Cell:
        """The cell that names an arm, with its mark and colour."""
        style = self.arms[name].style if name in self.arms else None
        return Cell(name, name, colour=style.colour if style else "", glyph=style.glyph if style else "")

    def base(self, *, few_shot: bool = False) -> Arm | None:
        """The first base that answers without solved examples before the question, or with them; None without one."""
        for arm in self.arms.values():
            shown = any(s.num_shots for found in arm.evaluations.values() for s in found)
            if arm.untrained and arm.evaluations and shown == few_shot:
                return arm
        return None

    def is_percent(self, panel: str) -> bool:
        """Whether every value of the panel's primary outcome lies in 0..1, so that it is written in percent."""
        found = [s for arm in self.arms.values() for s in arm.evaluations.get(panel, [])]
        return is_share(found, self.panels[panel].primary)


def collect(given: Iterable[Record], files: Sequence[str] = ()) -> Collection:
    """Return records by arm and panel. Study cells are opened; doubles count once; failed ones are listed."""
    sources = open_sources(given, files)
    kept = sorted((s for s in sources if s.record["kind"] in ("train", "evaluate")), key=lambda s: (s.task, s.run))
    studies = [s for s in sources if s.record["kind"] == "study" and s.status in ("done", "provisional")]
    present = list(dict.fromkeys(s.arm for s in kept))
    declared = [name for study in studies for name in study.record["config"].get("cells", {})]
    bases = list(dict.fromkeys(s.arm for s in kept if s.untrained))
    names = list(dict.fromkeys([n for n in (*bases, *declared, *present) if n in present]))
    styles = plots.arm_styles(names, bases)
    arms = {name: Arm(styles[name], name in bases) for name in names}
    reusing = {s.arm: str(s.config["reuse"]) for s in kept if s.config.get("reuse")}
    arms |= {name: replace(arms[name], reused=arms.get(source)) for name, source in reusing.items()}
    evaluations = [s for s in kept if s.record["kind"] == "evaluate" and s.status == "done"]
    panels = _panels(evaluations, studies)
    for source in kept:
        if source.record["kind"] == "train" and source.status in ("done", "provisional"):
            arms[source.arm].train.append(source)
    for source in evaluations:
        for panel in panels.values():
            if (source.model, source.task) == (panel.model, panel.evaluated_on) and (
                source.untrained or source.trained_on == panel.trained_on
            ):
                arms[source.arm].evaluations.setdefault(panel.name, []).append(source)
    return Collection(arms, panels, studies, sources)


def _panels(evaluations: Sequence[Source], studies: Sequence[Source]) -> dict[str, Panel]:
    """The panels that have data: those of trained arms, and a base's own where no arm was trained for it.

    Transfer comes last; models and tasks are in the order in which studies declare them, then by name.
    """
    trained = {(s.model, s.trained_on, s.task): s.record["primary"] for s in evaluations if not s.untrained}
    covered = {(model, tested) for model, _, tested in trained}
    alone = {
        (s.model, s.task, s.task): s.record["primary"]
        for s in evaluations
        if s.untrained and (s.model, s.task) not in covered
    }
    made = [Panel(*key, primary) for key, primary in (trained | alone).items()]
    configs = [study.record["config"] for study in studies]
    declared = [name for c in configs for name in c.get("models") or {}]
    declared += [t["name"] for c in configs for t in (*c.get("tasks", ()), *c.get("transfer", ()))]
    rank = {name: i for i, name in reversed(list(enumerate(declared)))}

    def place(panel: Panel) -> list[object]:
        words = (panel.model, panel.trained_on, panel.evaluated_on)
        return [panel.is_transfer, *((rank.get(word, len(declared)), word) for word in words)]

    return {panel.name: panel for panel in sorted(made, key=place)}


def origin(found: Sequence[Source]) -> str:
    """The address on the page of the records that a number was made from, all of one arm and kind."""
    return f"#{found[0].anchor if len(found) == 1 else found[0].group}"


def is_share(evaluations: Iterable[Source], metric: str) -> bool:
    """Return whether every value of `metric` lies in 0..1, so that it is written in percent."""
    return all(0.0 <= float(s.record["metrics"][metric]) <= 1.0 for s in evaluations if metric in s.record["metrics"])


def base_comparisons(collection: Collection, base: Arm) -> Compared:
    """Return the comparison of each (arm, panel) with `base`, as `Comparison.to_dict` plus `declared`.

    A comparison declared by a study is taken from it; the others are computed here and adjusted among themselves.
    """
    declared = {
        (c["arm"], c["task"]): c
        for study in collection.studies
        for c in study.record["comparisons"]
        if c["baseline"] == base.name
    }
    made = []
    for panel in collection.panels.values():
        for arm in collection.arms.values():
            if arm.name != base.name and (arm.name, panel.name) not in declared:
                result = against(arm, base, panel)
                if result is not None:
                    made.append(
                        stats.Comparison(
                            arm=arm.name, baseline=base.name, task=panel.name, metric=panel.primary, result=result
                        )
                    )
    adjusted = stats.holm([c.result.p for c in made])
    computed = {(c.arm, c.task): replace(c, p_holm=p).to_dict() for c, p in zip(made, adjusted, strict=True)}
    return {
        **{key: {**c, "declared": False} for key, c in computed.items()},
        **{key: {**c, "declared": True} for key, c in declared.items()},
    }


def against(arm: Arm, base: Arm, panel: Panel) -> stats.Difference | None:
    """The paired difference of two arms on their common seeds; None where the two cannot be paired.

    Runs of one seed (data orders, draws of a placement) are no further seeds: their mean is that seed's score.
    """
    sides = [_by_seed(one.evaluations.get(panel.name, [])) for one in (arm, base)]
    if not all(sides):
        return None
    if all(len(side) > 1 for side in sides):
        common = set(sides[0]) & set(sides[1])
        sides = [{seed: runs for seed, runs in side.items() if seed in common} for side in sides]
    firsts = [next(iter(side.values()), [{}])[0].get("example_ids") for side in sides]
    if not firsts[0] or firsts[0] != firsts[1] or len(firsts[0]) < 2:
        return None
    try:
        scores = [[score_array(runs, panel.primary).mean(axis=0) for runs in side.values()] for side in sides]
    except RecordError:
        return None
    return stats.paired_difference(scores[0], scores[1], seed=0)


def _by_seed(evaluations: Sequence[Source]) -> dict[int | None, list[Record]]:
    found: dict[int | None, list[Record]] = {}
    for source in evaluations:
        found.setdefault(source.seed, []).append(source.record)
    return found
