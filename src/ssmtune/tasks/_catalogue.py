"""The 611 schemas that the tasks are generated from, and which of them an example of a given size uses."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ssmtune.errors import ConfigError
from ssmtune.tasks.base import NEAR_DUPLICATE, Example, shingles, similarity

CATALOGUE_PATH = Path(__file__).resolve().parent.parent / "assets" / "catalogue.json.gz"

LICENCE = "ours; headers under Apache-2.0, MIT"

SCHEMA_EXPONENT = 0.7
"""At size s the first 611 * s**0.7 schemas are used: a small size has fewer labels *and* fewer examples of each.

With the same share of both (exponent 0.5) two per cent of a task would have 86 labels of 6 examples: too few to learn.
"""

MIN_SCHEMAS = 8
MAX_DRAWS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column: its snake-case name, the name its source writes, and its type."""

    name: str
    original: str
    type: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """One table: its label, the words of its name and its columns."""

    label: str
    name: str
    domain: str
    columns: tuple[Column, ...]


@functools.lru_cache(maxsize=1)
def catalogue() -> tuple[Schema, ...]:
    """Return all schemas, domains interleaved, so that a prefix is a spread of domains."""
    entries = json.loads(gzip.decompress(CATALOGUE_PATH.read_bytes()))
    return tuple(
        Schema(
            label=entry["label"],
            name=entry["name"],
            domain=entry["domain"],
            columns=tuple(Column(name=c["column"], original=c["original"], type=c["type"]) for c in entry["columns"]),
        )
        for entry in entries
    )


@functools.lru_cache(maxsize=1)
def column_frequency() -> Mapping[str, int]:
    """Return how many schemas have a column of each name: rare ones tell schemas apart."""
    return Counter(column.name for schema in catalogue() for column in schema.columns)


def num_examples(full_size: int, size: float) -> int:
    """Return how many examples there are at `size`. Raises `ConfigError` unless 0 < size <= 1."""
    _check_size(size)
    return max(1, round(full_size * size))


def schemas_at(size: float) -> tuple[Schema, ...]:
    """Return the schemas used at `size`; the same for every task and seed, so that small runs can be compared."""
    _check_size(size)
    everything = catalogue()
    return everything[: min(len(everything), max(MIN_SCHEMAS, round(len(everything) * size**SCHEMA_EXPONENT)))]


def _check_size(size: float) -> None:
    if not 0 < size <= 1:
        raise ConfigError(f"task size: got {size!r}; expected a share above 0 and at most 1. Use 1 for the whole task.")


def apportion(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Return `total` divided in proportion to `counts`, whole numbers, by largest remainder."""
    whole = sum(counts.values())
    shares = {key: count * total / whole for key, count in counts.items()}
    parts = {key: math.floor(share) for key, share in shares.items()}
    by_remainder = sorted(counts, key=lambda key: (parts[key] - shares[key], key))
    for key in by_remainder[: total - sum(parts.values())]:
        parts[key] += 1
    return parts


def slots(counts: Mapping[str, int], size: float) -> list[tuple[Schema, str]]:
    """Return (schema, variation) of every example at `size`: variations in proportion, schemas dealt out evenly."""
    schemas = schemas_at(size)
    parts = apportion(counts, num_examples(sum(counts.values()), size))
    variations = [variation for variation, count in parts.items() for _ in range(count)]
    return [(schemas[i % len(schemas)], variation) for i, variation in enumerate(variations)]


def draw(
    task_key: str,
    planned: Sequence[tuple[Schema, str]],
    make: Callable[[Schema, str, random.Random], tuple[str, str]],
    *,
    instruction: str,
) -> list[Example]:
    """Return one example per planned slot, no two of one schema being near-duplicates, so that no split can leak.

    `make` returns input and output. A draw too close to an earlier one of its schema is thrown away and drawn again.
    `task_key` names task, version and seed; with slot and draw it seeds the generator, so examples are independent.
    """
    earlier: dict[str, list[frozenset[tuple[str, ...]]]] = defaultdict(list)
    examples = []
    for number, (schema, variation) in enumerate(planned):
        for attempt in range(MAX_DRAWS):
            source, target = make(
                schema, variation, random.Random(f"{task_key}:{number}:{schema.label}:{variation}:{attempt}")
            )
            own = shingles(source)
            if all(similarity(own, other) < NEAR_DUPLICATE for other in earlier[schema.label]):
                break
        else:
            raise AssertionError(f"{task_key}: no new example of {schema.label} ({variation}) in {MAX_DRAWS} draws")
        earlier[schema.label].append(own)
        examples.append(
            Example(
                id=f"{task_key.split(':')[0]}-{number:05d}",
                instruction=instruction,
                input=source,
                output=target,
                schema=schema.label,
                variation=variation,
            )
        )
    return examples
