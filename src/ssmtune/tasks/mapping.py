"""Column mapping: from a file's headers to the columns a system expects, as JSON.

15,222 examples over 611 schemas in eight scenarios of equal size, as in the Granite study (methods.md, section 1.3).
A header is mapped when it stands for an expected column; a marked copy (`status_old`) or a foreign column never is.
Primary metric: `mapping_accuracy`.
"""

from __future__ import annotations

import dataclasses
import json
import random

from ssmtune.tasks._answers import first_object
from ssmtune.tasks._catalogue import LICENCE, Schema, apportion, draw, slots
from ssmtune.tasks._headers import (
    STYLES,
    abbreviated,
    camel,
    distinct,
    kebab,
    pascal,
    renamed,
    sentence,
    snake,
    title,
    truncated,
    upper,
    words_of,
)
from ssmtune.tasks.base import STOPS, Example, Kind

INSTRUCTION = (
    "Map each file header to the expected column it stands for and list expected columns without one. Answer in JSON."
)

SCENARIOS = (
    "standard",
    "api_export",
    "truncated",
    "renamed",
    "mixed_case",
    "extra_columns",
    "ambiguous",
    "different_naming",
)

FULL_SIZE = 15_222

COUNTS = apportion(dict.fromkeys(SCENARIOS, 1), FULL_SIZE)

FOREIGN = (
    "row_no",
    "batch",
    "loaded_at",
    "remarks",
    "checked",
    "file_name",
    "reviewer",
    "sheet",
    "department",
    "line_total",
    "tmp",
    "color",
)

COPY_MARKS = ("old", "copy", "raw", "backup", "prev")
"""A header with one of these words is a leftover of the column it names and is not mapped."""


@dataclasses.dataclass(frozen=True)
class Mapping:
    """The task; see the module."""

    name: str = "mapping"
    version: int = 1
    kind: Kind = "tables"
    primary: str = "mapping_accuracy"
    metrics: tuple[str, ...] = ("json_valid", "mapping_accuracy", "unmapped_accuracy")
    chance: float | None = None
    stops: tuple[str, ...] = STOPS
    max_new_tokens: int = 320
    full_size: int = FULL_SIZE
    licence: str = LICENCE

    def generate(self, size: float, seed: int) -> list[Example]:
        """Return `round(size * full_size)` examples over the schemas of that size, scenarios in equal parts."""
        return draw(f"{self.name}:{self.version}:{seed}", slots(COUNTS, size), _make, instruction=INSTRUCTION)

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return whether the answer is JSON, the share of expected pairs in it, and how well it lists the unmapped.

        `unmapped_accuracy` is 1 for the same set, else the share of the expected columns that are listed.
        """
        answer = first_object(completion)
        if answer is None:
            return dict.fromkeys(self.metrics, 0.0)
        expected = json.loads(example.output)
        pairs, found = expected["mapping"], answer.get("mapping")
        found = found if isinstance(found, dict) else {}
        right = sum(found.get(header) == column for header, column in pairs.items())
        return {
            "json_valid": 1.0,
            "mapping_accuracy": right / len(pairs),
            "unmapped_accuracy": _unmapped_accuracy(
                answer.get("unmapped_expected"), set(expected["unmapped_expected"])
            ),
        }


TASK = Mapping()


def _unmapped_accuracy(found: object, expected: set[str]) -> float:
    if not isinstance(found, list):
        return 0.0
    listed = {item for item in found if isinstance(item, str)}
    if listed == expected and all(isinstance(item, str) for item in found):
        return 1.0
    return len(listed & expected) / len(expected) if expected else 0.0


def _make(schema: Schema, variation: str, rng: random.Random) -> tuple[str, str]:
    names = [column.name for column in schema.columns]
    expected = rng.sample(names, rng.randint(5, min(8, len(names))))
    num_lost = rng.choice((0, 0, 1, 2)) if variation != "truncated" else rng.choice((0, 1, 2))
    present = rng.sample(expected, len(expected) - num_lost)
    headers = distinct(_headers(present, names, variation, rng), present)
    mapping = dict(zip(headers, present, strict=True))
    shown = [*headers, *_unmapped_headers(present, names, headers, variation, rng)]
    rng.shuffle(shown)
    unmapped = [column for column in expected if column not in present]
    source = json.dumps({"file_headers": shown, "expected_columns": expected})
    ordered = {header: mapping[header] for header in shown if header in mapping}
    return source, json.dumps({"mapping": ordered, "unmapped_expected": unmapped})


def _headers(columns: list[str], names: list[str], scenario: str, rng: random.Random) -> list[str]:
    """How the file writes each of the columns that it has."""
    style = rng.choice((title, sentence, pascal, camel))
    if scenario == "api_export":
        root = rng.choice(("data", "fields", "item", "record", "attributes"))
        return [f"{root}.{rng.choice((snake, camel))(words_of(column))}" for column in columns]
    if scenario == "truncated":
        return [_told_apart(truncated(column, rng), column, names) for column in columns]
    if scenario == "renamed":
        chosen = {column: renamed(column, rng) for column in columns}
        # A synonym that is another column's own name (status for state) would have two right answers.
        return [style(words if snake(words) not in names else words_of(column)) for column, words in chosen.items()]
    if scenario == "mixed_case":
        return [rng.choice(STYLES)(words_of(column)) for column in columns]
    if scenario == "different_naming":
        marked = rng.choice(("fld", "col", "x", "t"))
        return [rng.choice((abbreviated(column), f"{marked}_{column}", kebab(words_of(column)))) for column in columns]
    if scenario == "extra_columns":
        style = rng.choice((snake, upper, title))
    return [style(words_of(column)) for column in columns]


def _told_apart(header: str, column: str, names: list[str]) -> str:
    """`header`, or the whole name where the cut one could as well stand for another column of the schema."""
    fits = [
        name for name in names if name.startswith(header) or name.replace("_", "").startswith(header.replace("_", ""))
    ]
    return header if set(fits) <= {column} else column


def _unmapped_headers(
    present: list[str], names: list[str], headers: list[str], scenario: str, rng: random.Random
) -> list[str]:
    """Headers that stand for no expected column: foreign ones, or marked copies of one that is there."""
    taken = {header.lower() for header in headers}
    if scenario == "extra_columns":
        extra = rng.sample([name for name in FOREIGN if name not in names and name not in taken], rng.randint(2, 3))
    elif scenario == "ambiguous":
        copied = rng.sample(present, min(len(present), rng.randint(1, 3)))
        extra = [f"{column}_{rng.choice(COPY_MARKS)}" for column in copied]
    else:
        return []
    return [header for header in extra if header.lower() not in taken]
