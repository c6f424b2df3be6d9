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
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ssmtune.verify.base import CheckResult

CHECK_HEADINGS = ("check", "result", "measured", "limit", "where")

NARROWEST = 68
"""Columns of a terminal that a table of checks needs beside their names, so that a place has 36 or more."""

NOTE = ".*was trained on a base in.*"
"""The one notice of ours that is a warning (`quantized.QuantizationNote`)."""

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


def print_table(table: Table) -> None:
    """Print a table on stdout under its title; rich alone would break the title at the table's own width."""
    console, title, table.title = tables(), table.title, None
    if title is not None:
        console.print(title, style="table.title", highlight=False)
    console.print(table)


def print_checks(title: str, checks: Iterable[CheckResult]) -> None:
    """Print one row per check; where the worst value is goes below the table, for failed ones, when there is no room."""
    checks = list(checks)
    roomy = tables().width >= NARROWEST + max(len(check.name) for check in checks)
    table = make_table(title, *CHECK_HEADINGS[: None if roomy else -1], numbers=("measured", "limit"), wrap=("where",))
    for check in checks:
        mark = "[green]ok[/green]" if check.ok else "[red]FAILED[/red]"
        row = (check.name, mark, f"{check.measured:.3g}", f"{check.limit:.3g}")
        table.add_row(*row, *([escape(check.where)] if roomy else []))
    print_table(table)
    for check in checks:
        if not check.ok:
            tables().print(
                escape(f"{check.name}: {'' if roomy else f'{check.where}; '}{check.detail}"), highlight=False
            )


def print_evaluation(records: list[dict[str, Any]]) -> None:
    """Print the table of one evaluation, or of two on the same examples with their paired difference, on stdout."""
    from ssmtune.stats import paired_difference

    names = [record["name"] for record in records]
    headings = ["metric", *names, *(["difference [95 % interval]"] if len(records) == 2 else [])]
    table = make_table(
        f"{records[0]['task']}, {len(records[0]['example_ids'])} examples", *headings, numbers=headings[1:]
    )
    for metric in records[0]["metrics"]:
        row = [metric, *(f"{record['metrics'][metric]:.1%}" for record in records)]
        if len(records) == 2:
            ours, theirs = ([record["scores"][metric]] for record in records)
            result = paired_difference(ours, theirs, seed=0)
            row.append(f"{result.difference:+.1%} [{result.low:+.1%}, {result.high:+.1%}]")
        table.add_row(*row)
    for metric in records[0].get("corpus_metrics", {}):
        values = [record["corpus_metrics"][metric] for record in records]
        difference = [f"{values[0] - values[1]:+.1%} (no interval)"] if len(records) == 2 else []
        table.add_row(f"{metric} (whole set)", *(f"{value:.1%}" for value in values), *difference)
    for variation, found in records[0].get("variations", {}).items():
        values = [record["variations"][variation][records[0]["primary"]] for record in records]
        difference = [f"{values[0] - values[1]:+.1%} ({found['num']} examples)"] if len(records) == 2 else []
        table.add_row(f"{records[0]['primary']}, {variation}", *(f"{value:.1%}" for value in values), *difference)
    print_table(table)
    guesses = {"guessing": records[0].get("chance"), "always the commonest answer": records[0].get("commonest")}
    words = [f"{how} {value:.1%}" for how, value in guesses.items() if value]
    if words:
        tables().print(f"{records[0]['primary']} of {', of '.join(words)}", highlight=False)


def split_list(value: str) -> tuple[str, ...]:
    """Return the entries of an option that holds several, separated by commas."""
    return tuple(entry.strip() for entry in value.split(",") if entry.strip())


def quiet_libraries() -> None:
    """Keep the libraries' notices off the screen: what a user has to know, ssmtune says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("transformers", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Where it is installed, PEFT imports it; on some CPUs it would then fetch code from the hub, or say that it cannot.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    warnings.filterwarnings("once", message=NOTE)


def layer_ranges(layers: list[int]) -> str:
    """Return layer numbers as ranges: "0-4, 6-14"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
