"""Where a command's result and words go: with --json the result is the only thing on stdout, words are on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ssmtune.verify.base import CheckResult

CHECK_HEADINGS = ("check", "result", "measured", "limit", "where")

words = Console(stderr=True, soft_wrap=True)


def print_result(value: Any) -> None:
    """Print a result as JSON on stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def tables() -> Console:
    """A console on stdout for tables meant for people."""
    return Console(soft_wrap=False)


def make_table(title: str, *headings: str, numbers: Collection[str] = (), wrap: Collection[str] = ()) -> Table:
    """Return an empty table that fits a terminal of 80 columns: lines only under the headings, numbers on the right.

    Only the columns in `wrap` break their text over lines; a role or a number cut short would be useless.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading in numbers else "left"
        table.add_column(heading, justify=justify, no_wrap=heading not in wrap, overflow="fold")
    return table


def check_rows(table: Table, checks: Iterable[CheckResult]) -> None:
    """Add one row per check to a table of check, result, measured, limit, where."""
    for check in checks:
        mark = "[green]ok[/green]" if check.ok else "[red]FAILED[/red]"
        table.add_row(check.name, mark, f"{check.measured:.3g}", f"{check.limit:.3g}", check.where)


def quiet_libraries() -> None:
    """Keep the libraries' notices off the screen: what a user has to know, ssmtune says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def layer_ranges(layers: list[int]) -> str:
    """Return layer numbers as ranges: "0-4, 6-14"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
