"""Sets that lie on a hub: fetched by `datasets`, when the user asks for it, and turned into rows of ours.

The columns are those of the sets' own cards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ssmtune.errors import DataError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
    """Where `datasets` finds a set, which of its splits is which, and how one of its rows becomes one of ours."""

    path: str
    splits: Mapping[str, str]
    row: Callable[[Row], Row]
    config: str | None = None
    revision: str | None = None


def fetch_rows(task: str, hub: Hub, split: str) -> list[Row]:
    """Return the rows of one split, labels as their names. `DataError`: not there, or other columns."""
    from datasets import ClassLabel, load_dataset

    if split not in hub.splits:
        raise DataError(f"task {task!r}: {hub.path} has no split for {split!r}; it has {list(hub.splits)}.")
    try:
        data = load_dataset(hub.path, hub.config, split=hub.splits[split], revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"task {task!r}: {hub.path} cannot be fetched ({str(error).splitlines()[0]}). "
            "Check the network, or give a directory that holds the set (docs/tasks.md)."
        ) from None
    labels = {name: f for name, f in data.features.items() if isinstance(f, ClassLabel)}
    rows = []
    for number, found in enumerate(data):
        # A hidden label is written as -1.
        named = {k: labels[k].int2str(v) if k in labels and v >= 0 else v for k, v in found.items()}
        try:
            rows.append({"id": f"{task}-{split}-{number}", **hub.row(named)})
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"task {task!r}: row {number} of {hub.path} is not as expected ({error!r}); it has the columns "
                f"{list(found)}. Give a directory that holds the set (docs/tasks.md)."
            ) from None
    return rows
