"""The records of a report one by one: opened, checked for what the sections read, and named on the page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from ssmtune import records
from ssmtune.errors import RecordError, nearest

Record = Mapping[str, Any]
BASE = "base"

HEAD: dict[str, type | tuple[type, ...]] = {"status": str, "config": dict, "environment": dict}
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "evaluate": {"task": str, "primary": str, "metrics": dict, "scores": dict, "example_ids": list, "seed": int},
    "study": {
        "name": str,
        "arms": list,
        "tasks": list,
        "comparisons": list,
        "num_comparisons": int,
        "minimum_detectable_effect": list,
        "num_cells": dict,
        "missing": list,
        "failures": list,
        "method": str,
    },
    "verify": {"ok": bool, "checks": list},
    "preregistration": {"digest": str, "config": dict, "num_comparisons": int},
}
"""What the page reads of a record that is done or provisional, beside the head that all kinds share."""


@dataclass(frozen=True)
class Source:
    """One record as the page shows it: `file` is where it lies, seen from the page; `cell` is the study cell around it."""

    record: Record
    file: str = ""
    cell: Record | None = None

    @cached_property
    def digest(self) -> str:
        """The record's digest."""
        return records.digest(self.record)

    @property
    def anchor(self) -> str:
        """The id of its row on the page; two cells may hold the same record."""
        return f"record-{self.digest}" + ("" if self.cell is None else f"-{self.cell.get('digest', '')}")

    @property
    def group(self) -> str:
        """The id of the rows of its arm and task: where a number that averages over runs comes from."""
        names = [self.record["kind"], self.model, self.arm, self.task, self.trained_on]
        return f"records-{records.digest(names)}"

    @property
    def status(self) -> str:
        """The record's status, or that of its cell where the cell is not done: then nothing in it counts."""
        own = str(self.record.get("status", "done"))
        return own if self.cell is None or self.cell["status"] == "done" else str(self.cell["status"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the cell, or of the record where it stands alone."""
        config: Mapping[str, Any] = (self.record if self.cell is None else self.cell)["config"]
        return config

    @property
    def model(self) -> str:
        """The name of the model in a study of several, else empty."""
        return str(self.config.get("model_name") or "") if self.cell is not None else ""

    @property
    def arm(self) -> str:
        """The arm that it is a run of, or an evaluation of."""
        if self.cell is not None:
            return str(self.config["cell"])
        return str(self.record.get("name") or self.config.get("recipe") or self.config.get("run") or BASE)

    @property
    def num_shots(self) -> int:
        """How many solved examples stood before each question."""
        return int(self.record["config"].get("shots") or 0)

    @property
    def untrained(self) -> bool:
        """Whether it evaluates a base as it is."""
        if self.cell is not None:
            return self.config.get("recipe") is None and self.config.get("reuse") is None
        # "base, 5 shots" is a base as well.
        return self.record["kind"] == "evaluate" and self.arm.partition(",")[0] == BASE

    @property
    def task(self) -> str:
        """What it trains on or is evaluated on, as it was asked for: a task of somebody's own calls itself otherwise.

        "training" for a run on somebody's own data, empty for other kinds.
        """
        config = self.record["config"]
        data = config.get("data") or {}
        return str(
            data.get("task")
            or config.get("task")
            or self.record.get("task")
            or ("training" if self.record["kind"] == "train" else "")
        )

    @property
    def trained_on(self) -> str:
        """The task that was trained on; empty for a base."""
        return "" if self.untrained else str(self.config["task"] if self.cell is not None else self.task)

    @property
    def seed(self) -> int | None:
        """The seed of the run, where it has one."""
        seed = self.record.get("seed", self.record["config"].get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def run(self) -> tuple[int, int, int]:
        """Seed, data order and draw of a placement at random: what is paired with the same of another arm."""
        cell = self.config if self.cell is not None else {}
        return (self.seed or 0, int(cell.get("data_order") or 0), int(cell.get("draw") or 0))


def open_sources(given: Iterable[Record], files: Sequence[str] = ()) -> list[Source]:
    """Return single records in place of the study cells that hold them; one that a cell holds too counts there.

    Raises `RecordError` naming file and field when a record lacks what the page reads.
    """
    given = list(given)
    found: dict[str, Source] = {}
    for record, file in zip(given, files or [""] * len(given), strict=True):
        check_fields(record, file or "a record")
        for one in _opened(record, file):
            found.setdefault(one.anchor, one)
    held = {one.digest for one in found.values() if one.cell is not None}
    return [one for one in found.values() if one.cell is not None or one.digest not in held]


def _opened(record: Record, file: str) -> Iterator[Source]:
    """The records inside a study cell under the cell's name; a cell that holds none stays itself."""
    inner: list[Record | None] = []
    if record["kind"] == "study_cell":
        inner = [record.get("train"), record.get("evaluate"), *(record.get("transfer") or [])]
    inside = [r for r in inner if r is not None]
    cell = record if record["kind"] == "study_cell" and {"cell", "task"} <= set(record["config"]) else None
    for one in inside:
        check_fields(one, file or "a study cell")
        yield Source({"name": record.get("name"), **one}, file, cell)
    if not inside:
        yield Source(record, file, cell)


def records_of(sources: Iterable[Source]) -> list[Record]:
    """Return the records of `sources`."""
    return [source.record for source in sources]


def check_fields(record: Record, where: str) -> None:
    """Raise `RecordError` when a record is of no known kind or lacks a field that the page reads."""
    kinds = (*get_args(records.Kind), "preregistration")
    if record.get("kind") not in kinds:
        raise RecordError(f"{where}: is of kind {record.get('kind')!r}; {nearest(str(record.get('kind')), kinds)}.")
    kind = str(record["kind"])
    head = {} if kind == "preregistration" else HEAD
    ended = record.get("status", "done") in ("done", "provisional")
    needed = {**head, **(FIELDS.get(kind, {}) if ended else {})}
    for field, wanted in needed.items():
        value = record.get(field)
        if not isinstance(value, wanted):
            words = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
            expected = " or ".join(t.__name__ for t in (wanted if isinstance(wanted, tuple) else (wanted,)))
            raise RecordError(
                f"{where}: field {field!r} of this {kind} record holds {words}; expected {expected}. "
                f"Run the stage that writes it again, or move the file away."
            )
