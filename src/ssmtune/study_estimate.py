"""What a study will cost, stated before it runs: cells, tokens, and time from the cells that are done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from ssmtune.study_cells import Cell, CellSpec


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one cell takes by its settings: tokens that it trains on, and questions that it answers."""

    tokens: int
    questions: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is left of a study. `seconds` is None where no cell has been timed; `num_timed` were, to know it from."""

    num_cells: int
    num_done: int
    num_failed: int
    num_tuning: int
    tokens: int
    questions: int
    num_timed: int
    cell_seconds: float | None
    seconds: float | None
    workers: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    def text(self) -> str:
        """The estimate in words."""
        left = self.num_cells - self.num_done
        words = [f"{self.num_cells} cells, {self.num_done} done"]
        if self.num_failed:
            words.append(f"{self.num_failed} failed before and will be tried again")
        if self.num_tuning:
            words.append(f"{self.num_tuning} of them to choose rates")
        words.append(f"to do: {left} cells, {self.tokens:,} tokens to train on, {self.questions:,} questions to answer")
        if not left:
            return "; ".join(words[:-1]) + "."
        if self.seconds is None:
            words.append("time unknown: no cell has been timed yet (--calibrate runs one of each kind)")
        else:
            how = "this process" if self.workers == 0 else f"{self.workers} workers"
            words.append(
                f"about {timedelta(seconds=round(self.seconds))} with {how}, "
                f"from {self.num_timed} timed cells ({self.cell_seconds:.3g} s each)"
            )
        return "; ".join(words) + "."


def estimate(
    cells: Sequence[Cell],
    found: Mapping[str, Mapping[str, Any]],
    cost_of: Callable[[CellSpec], Cost],
    *,
    workers: int,
) -> Estimate:
    """Return the estimate of `cells`, of which `found` (digest -> record) have a record.

    A cell's time is the median of the done cells most like it: of its model, arm and task; of its model and task; of its
    model; of any. They were timed beside as many others as ran then, so a study that is half done knows best.
    """
    done = [(cell.spec, found[cell.digest]) for cell in cells if _is_done(found.get(cell.digest))]
    left = [cell.spec for cell in cells if not _is_done(found.get(cell.digest))]
    timed: dict[tuple[Any, ...], list[float]] = {}
    for spec, record in done:
        if record.get("seconds") is not None:
            for key in _likenesses(spec):
                timed.setdefault(key, []).append(record["seconds"])
    costs = [cost_of(spec) for spec in left]
    seconds = [
        next((statistics.median(timed[key]) for key in _likenesses(spec) if key in timed), None) for spec in left
    ]
    known = [value for value in seconds if value is not None]
    return Estimate(
        num_cells=len(cells),
        num_done=len(done),
        num_failed=sum(record["status"] == "failed" for record in found.values()),
        num_tuning=sum(bool(cell.spec.rates) for cell in cells),
        tokens=sum(cost.tokens for cost in costs),
        questions=sum(cost.questions for cost in costs),
        num_timed=len(timed.get((), ())),
        cell_seconds=statistics.mean(known) if known else None,
        # The last cells do not start all at once: no less than the longest takes.
        seconds=max(sum(known) / max(1, workers), max(known)) if known else None,
        workers=workers,
    )


def calibration_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells whose times tell the others': of each model and task, one of each kind (tuning, trained, base)."""
    chosen: dict[tuple[Any, ...], Cell] = {}
    for cell in cells:
        spec = cell.spec
        if not cell.needs:
            chosen.setdefault((spec.model_name, spec.task, bool(spec.rates), spec.recipe is None), cell)
    return list(chosen.values())


def _is_done(record: Mapping[str, Any] | None) -> bool:
    return record is not None and record["status"] == "done"


def _likenesses(spec: CellSpec) -> list[tuple[Any, ...]]:
    kind = (bool(spec.rates), spec.recipe is None)
    return [
        (*kind, spec.model_name, spec.task, spec.cell),
        (*kind, spec.model_name, spec.task),
        (*kind, spec.model_name),
        kind,
        (),
    ]
