"""Tasks over published sets: where their files lie, how a row becomes an example, and what to say when a set is missing.

A set is never fetched unasked: it lies in a directory of the user's, or is named "hub" for `datasets` to fetch it.
In a directory it is `tasks/<folder>/<split>.jsonl.gz`, or `<folder>/<split>.jsonl` and the like, one JSON object a line
with the strings `id`, `input`, `target` and whatever else the task's file names.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ssmtune.data import read_lines, read_object
from ssmtune.errors import DataError
from ssmtune.records import file_sha256
from ssmtune.tasks._hub import Hub, Row, fetch_rows
from ssmtune.tasks.base import STOPS, Example, Kind, Side, SourcedExample, stop_text

HUB = "hub"
"""As a directory: let `datasets` fetch the set by its name."""

VARIABLE = "SSMTUNE_DATA"
"""Names the directory where none is given."""

SPLITS = ("train", "validation", "test")


def locate_lines(directory: Path, folder: str, split: str) -> tuple[Path, ...]:
    """Return the file of one split of a set, or nothing when there is none."""
    for parent in (directory / "tasks" / folder, directory / folder):
        for ending in (".jsonl.gz", ".jsonl"):
            if (parent / f"{split}{ending}").is_file():
                return (parent / f"{split}{ending}",)
    return ()


def read_rows(paths: tuple[Path, ...], split: str) -> list[Row]:
    """Return the rows of a set's file. Raises `DataError` naming file and line of the first bad one."""
    rows = []
    for where, text in read_lines(paths[0]):
        row = read_object(text, where)
        for field in ("id", "input", "target"):
            if not isinstance(row.get(field), str):
                raise DataError(f"{where}: field {field!r}: got {row.get(field)!r}; expected a string.")
        rows.append(row)
    if not rows:
        raise DataError(f"{paths[0]}: is empty. Expected one JSON object a line with 'id', 'input' and 'target'.")
    return rows


def no_score(text: str, example: SourcedExample) -> dict[str, float]:
    """The scorer of a set that is for training alone."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourcedTask:
    """A task over a published set; each field says what the task's file decides.

    `scorer` is given the answer up to its stop. `corpus` returns `corpus_metrics`, which a set is judged by as a whole.
    `tested` and `trained`: whether the set has such a side; `test_split` is the split that the test side is.
    """

    name: str
    version: int
    kind: Kind
    instruction: str
    folder: str
    licence: str
    samples: tuple[Row, ...]
    primary: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    scorer: Callable[[str, SourcedExample], dict[str, float]]
    chance: float | None = None
    stops: tuple[str, ...] = STOPS
    test_split: str = "test"
    trained: bool = True
    tested: bool = True
    hub: Hub | None = None
    restriction: str = ""
    corpus_metrics: tuple[str, ...] = ()
    corpus: Callable[[Sequence[str], Sequence[SourcedExample]], dict[str, float]] | None = None
    executes: bool = False
    variation: str = ""
    locate: Callable[[Path, str, str], tuple[Path, ...]] = locate_lines
    read: Callable[[tuple[Path, ...], str], list[Row]] = read_rows

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return every metric for what a model wrote up to its stop."""
        assert isinstance(example, SourcedExample)
        return self.scorer(stop_text(completion, self.stops), example)

    def score_corpus(self, completions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Return the metrics of all answers together; empty for a task that has none."""
        if self.corpus is None:
            return {}
        kept = [stop_text(completion, self.stops) for completion in completions]
        return self.corpus(kept, [e for e in examples if isinstance(e, SourcedExample)])

    def examples(self, side: Side, size: float, directory: str | None) -> list[SourcedExample]:
        """Return the examples of one side in a fixed random order; `size` is a share of the training side alone."""
        split = self._split(side)
        directory = data_directory(directory)
        rows = (
            fetch_rows(self.name, self._hub(), split)
            if directory == HUB
            else self.read(self._files(split, directory), split)
        )
        random.Random(f"{self.name}:{side}").shuffle(rows)
        if side == "train":
            rows = rows[: max(1, round(size * len(rows)))]
        return [self._example(row, split) for row in rows]

    def sample_examples(self) -> list[SourcedExample]:
        """Return the invented examples of the task's file."""
        return [self._example({"id": f"{self.name}-sample-{i}", **row}, "sample") for i, row in enumerate(self.samples)]

    def sources(self, side: Side, directory: str | None) -> dict[str, str]:
        """Return the sha256 of each file that `examples` reads, or the name on the hub."""
        split, directory = self._split(side), data_directory(directory)
        if directory == HUB:
            hub = self._hub()
            return {f"hub/{hub.path}": "/".join(str(v) for v in (hub.config, hub.splits.get(split), hub.revision))}
        return {f"{self.folder}/{path.name}": file_sha256(path) for path in self._files(split, directory)}

    def found_splits(self, directory: str | None) -> list[str]:
        """Return which splits lie in the directory."""
        directory = data_directory(directory)
        if directory is None or directory == HUB:
            return []
        return [split for split in SPLITS if self.locate(Path(directory), self.folder, split)]

    def _split(self, side: Side) -> str:
        if side == "train" and not self.trained:
            raise DataError(
                f"task {self.name!r}: has no training side, it is for evaluation alone. Train on another task."
            )
        if side == "test" and not self.tested:
            raise DataError(
                f"task {self.name!r}: has no test side, it is for training alone. Evaluate on another task."
            )
        return "train" if side == "train" else self.test_split

    def _files(self, split: str, directory: str | None) -> tuple[Path, ...]:
        found = self.locate(Path(directory), self.folder, split) if directory is not None else ()
        if found:
            return found
        where = "no data directory is given" if directory is None else f"{directory} holds no split {split!r} of it"
        fetch = "" if self.hub is None else f", or name '{HUB}' as the directory to download {self.hub.path}"
        raise DataError(
            f"task {self.name!r}: {where}. Put it at DIR/tasks/{self.folder}/{split}.jsonl.gz (docs/tasks.md says what "
            f"a line holds) and give DIR as --data, as data.directory of a run, or in {VARIABLE}{fetch}. "
            f"Licence of the set: {self.terms}."
        )

    @property
    def terms(self) -> str:
        """The licence with what it restricts."""
        return self.licence + (f"; {self.restriction}" if self.restriction else "")

    def _hub(self) -> Hub:
        if self.hub is None:
            raise DataError(f"task {self.name!r}: is on no hub. Give a directory that holds it (docs/tasks.md).")
        return self.hub

    def _example(self, row: Row, split: str) -> SourcedExample:
        facts = {key: value for key, value in row.items() if key not in ("id", "input", "target")}
        return SourcedExample(
            id=row["id"],
            instruction=self.instruction,
            input=row["input"],
            output=row["target"],
            schema=self.folder,
            variation=str(row.get(self.variation, split)),
            facts=facts,
        )


def data_directory(directory: str | None) -> str | None:
    """Return the directory that is given, else the one that the environment names, else None."""
    return directory or os.environ.get(VARIABLE) or None
