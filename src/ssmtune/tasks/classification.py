"""Schema classification: from the headers and two or three rows of a table to the label of its schema.

24,369 examples over 611 schemas in ten variations with the counts of the Granite study (methods.md, section 1.3).
Sample values are invented; headers come from public API descriptions.
Primary metric: `exact`.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Sequence

from ssmtune.tasks._catalogue import LICENCE, Column, Schema, catalogue, column_frequency, draw, slots
from ssmtune.tasks._headers import STYLES, abbreviated, camel, distinct, renamed, snake, title, words_of
from ssmtune.tasks._values import value
from ssmtune.tasks.base import STOPS, Example, Kind, stop_text

INSTRUCTION = "Which schema does this table follow? Answer with the schema label only."

COUNTS = {
    "full": 2436,
    "partial": 2443,
    "renamed": 3627,
    "minimal": 2440,
    "shuffled": 2437,
    "mixed_case": 2434,
    "extra_columns": 2439,
    "api_export": 2434,
    "legacy": 1837,
    "confusable": 1842,
}

FOREIGN = tuple(
    Column(name=name, original=name, type=kind)
    for name, kind in (
        ("row_number", "integer"), ("import_batch", "string"),
        ("loaded_at", "timestamp"), ("notes", "string"), ("checked", "boolean"), ("file_name", "string"),
        ("reviewed_by", "string"),
        ("sheet_date", "date"), ("department", "string"), ("line_total", "number"),
    )
)  # fmt: skip
"""Columns that someone who keeps a table by hand adds to any of them."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task; see the module."""

    name: str = "classification"
    version: int = 1
    kind: Kind = "tables"
    primary: str = "exact"
    metrics: tuple[str, ...] = ("exact", "contains")
    chance: float | None = 1 / 611
    stops: tuple[str, ...] = STOPS
    max_new_tokens: int = 32
    full_size: int = sum(COUNTS.values())
    licence: str = LICENCE

    def generate(self, size: float, seed: int) -> list[Example]:
        """Return `round(size * full_size)` examples over the schemas of that size, variations in proportion."""
        return draw(f"{self.name}:{self.version}:{seed}", slots(COUNTS, size), _make, instruction=INSTRUCTION)

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return whether the first line of the answer is the label, and whether it holds the label as a word."""
        lines = stop_text(completion).strip().lower().splitlines()
        answer, label = (lines[0].strip() if lines else ""), example.output.lower()
        contains = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer) is not None
        return {"exact": float(answer == label), "contains": float(contains)}


TASK = Classification()


def _make(schema: Schema, variation: str, rng: random.Random) -> tuple[str, str]:
    columns = _columns(schema, variation, rng)
    headers = distinct(_headers(schema, columns, variation, rng), [column.name for column in columns])
    prefix = schema.name.replace("_", "")[:3].upper()
    rows = [[value(column, prefix, rng) for column in columns] for _ in range(rng.choice((2, 3)))]
    return "\n".join("\t".join(cells) for cells in [headers, *rows]), schema.label


def _columns(schema: Schema, variation: str, rng: random.Random) -> list[Column]:
    """The columns that a variation shows, in their order."""
    columns = list(schema.columns)
    if variation == "shuffled":
        return rng.sample(columns, len(columns))
    if variation == "minimal":
        return _keep(columns, rng.choice((3, 4, 5)), rng)
    if variation == "extra_columns":
        kept = _keep(columns, len(columns) - rng.choice((0, 1, 2)), rng)
        for foreign in rng.sample(FOREIGN, rng.choice((2, 3))):
            kept.insert(rng.randint(0, len(kept)), foreign)
        return kept
    if variation == "confusable":
        return _confusable(schema, rng)
    if variation in ("partial", "renamed", "api_export", "legacy"):
        return _keep(columns, round(len(columns) * rng.uniform(0.6, 0.85)), rng)
    return columns


def _keep(columns: Sequence[Column], num: int, rng: random.Random) -> list[Column]:
    """`num` columns in their order, among them two of the schema's four rarest, so that the answer stays inferable."""
    rarest = sorted(columns, key=lambda column: (column_frequency()[column.name], column.name))[:4]
    kept = rng.sample(rarest, 2)
    rest = [column for column in columns if column not in kept]
    kept += rng.sample(rest, min(len(rest), num - 2))
    return [column for column in columns if column in kept]


def _confusable(schema: Schema, rng: random.Random) -> list[Column]:
    """The columns shared with the most similar schema, two of that schema's own, and two of the rarest of this one."""
    twin = nearest_schema(schema.label)
    shared_names = {column.name for column in schema.columns} & {column.name for column in twin.columns}
    shared = [column for column in schema.columns if column.name in shared_names]
    own = _keep([column for column in schema.columns if column.name not in shared_names], rng.choice((2, 3)), rng)
    foreign = [column for column in twin.columns if column.name not in shared_names]
    mixed = [*shared, *own, *rng.sample(foreign, min(len(foreign), 2))]
    return rng.sample(mixed, len(mixed))


@functools.lru_cache(maxsize=1024)
def nearest_schema(label: str) -> Schema:
    """Return the other schema of the catalogue that shares the largest part of its columns with `label`."""
    (own,) = (schema for schema in catalogue() if schema.label == label)
    names = {column.name for column in own.columns}

    def overlap(other: Schema) -> float:
        theirs = {column.name for column in other.columns}
        return len(names & theirs) / len(names | theirs)

    return max((schema for schema in catalogue() if schema.label != label), key=overlap)


def _headers(schema: Schema, columns: Sequence[Column], variation: str, rng: random.Random) -> list[str]:
    """The header of each column as the variation writes it."""
    if variation == "renamed":
        style = rng.choice((title, snake, camel))
        return [style(renamed(column.name, rng)) for column in columns]
    if variation == "mixed_case":
        return [rng.choice(STYLES)(words_of(column.name)) for column in columns]
    if variation == "legacy":
        return [abbreviated(column.name) for column in columns]
    if variation == "api_export":
        # The table's own word would give the label away, so paths use the words of any export.
        root = rng.choice(("data", "fields", "item", "record", "attributes"))
        return [f"{root}.{column.name}" if rng.random() < 0.6 else column.name for column in columns]
    if variation in ("full", "partial", "confusable") and rng.random() < 0.5:
        return [column.original for column in columns]
    return [column.name for column in columns]
