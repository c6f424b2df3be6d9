"""The comparisons that a study declared before it ran: forest plots by family, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.stats

from ssmtune.report import forest, text
from ssmtune.report.arms import Collection
from ssmtune.report.results import interval_cell, verdict_cell
from ssmtune.report.sections import Figure, Figures, Section
from ssmtune.report.sources import Record, Source
from ssmtune.report.tables import Cell, Column, Table, file_name, plain

HOW = (
    "Each dot is a paired difference with its 95 % interval, in percentage points (pp) where the outcome is a share; right "
    "of the dashed line the first-named arm scores higher. Grey and open: no difference was found. Resolvable is the true "
    "difference that a repetition would find with a probability of 80 %; at most, where it is given, is what the true "
    "difference does not exceed, either way, as far as the interval says."
)
HOW_CHANCE = (
    "Orange band: where one more placement at random would fall, in 95 of 100 cases, around the mean of those drawn; the "
    "interval of such a comparison holds their spread."
)


def comparisons(collection: Collection, figures: Figures) -> Section:
    """One forest plot per study, family and panel, with the band of placements at random where one was drawn."""
    tables: list[Table] = []
    made: list[Figure] = []
    words: list[str] = []
    for study in collection.studies:
        record = study.record
        words += _words(record)
        for family, found in _families(record).items():
            label = f"{record['name']}, family {family}" if family else str(record["name"])
            name = file_name("comparisons", *([str(record["name"])] if len(collection.studies) > 1 else []), family)
            tables.append(_table(name, f"{label}: {_num(record, family)} comparisons", found, study, record))
            by_panel: dict[str, list[Record]] = {}
            for c in found:
                by_panel.setdefault(c["task"], []).append(c)
            for panel, here in by_panel.items():
                percent = is_share(record, panel)
                effects = [_effect(record, c, percent=percent) for c in here]
                figure = forest.forest(effects, axis=_axis(percent), percent=percent)
                title = f"{panel} ({family})" if len(_families(record)) > 1 else panel
                made.append(figures.add(figure, title, name))
    return Section(
        "comparisons",
        "Comparisons declared in advance",
        words=words,
        tables=tables,
        figures=made,
        how=f"{HOW} {HOW_CHANCE}"
        if any(null_band(c) for s in collection.studies for c in s.record["comparisons"])
        else HOW,
        empty="No declared comparison has data yet.",
    )


def _families(record: Record) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for c in record["comparisons"]:
        found.setdefault(str(c.get("family") or ""), []).append(c)
    return found


def _num(record: Record, family: str) -> int:
    sizes = {f["name"]: int(f["num_comparisons"]) for f in record.get("families") or []}
    return sizes.get(family, int(record["num_comparisons"]))


def is_share(record: Record, panel: str) -> bool:
    """Return whether all values of a panel's primary outcome in a study record lie in 0..1."""
    table = next((t for t in record["tasks"] if t["task"] == panel), None)
    if table is None:
        return False
    return all(0 <= v <= 1 for arm in table["arms"] for v in arm["metrics"][table["primary"]]["values"])


def _axis(percent: bool) -> str:
    return "difference (pp)" if percent else "difference"


def _effect(record: Record, c: Record, *, percent: bool) -> forest.Effect:
    differs = c["verdict"] in ("higher", "lower")
    words = text.difference_text(c["difference"], percent=percent)
    said = words if differs else f"{words}, {c['verdict']}"
    return forest.Effect(
        f"{c['arm']} vs {c['baseline']}", c["difference"], c["low"], c["high"], differs, said, null_band(c)
    )


def null_band(c: Record) -> tuple[float, float] | None:
    """Return where one more placement at random would fall around those drawn, in 95 of 100 cases; None without draws.

    The interval of prediction of one value from `num_draws` others of spread `sd_draw`, by Student's t.
    """
    num = int(c.get("num_draws") or 1)
    if not c.get("is_null") or num < 2:
        return None
    half = float(scipy.stats.t.ppf(0.975, num - 1)) * float(c["sd_draw"]) * math.sqrt(1 + 1 / num)
    return -half, half


def _table(name: str, caption: str, found: Sequence[Record], study: Source, record: Record) -> Table:
    resolvable = {(m["arm"], m["baseline"], m["task"]): m["effect"] for m in record["minimum_detectable_effect"]}
    with_null = any(null_band(c) for c in found)
    with_margin = any(c.get("margin") for c in found)
    with_bound = any(c.get("no_larger_than") is not None for c in found)
    columns = [
        Column("task"),
        Column("comparison"),
        Column("difference", num=True),
        Column("95 % interval", parts=("low", "high")),
        Column("p", num=True),
        Column("p (Holm)", num=True),
        Column("seeds agree", num=True, parts=("", "of")),
        Column("resolvable", num=True),
        Column("verdict"),
        *([Column("at random", parts=("low", "high")), Column("draws", num=True)] if with_null else []),
        *([Column("at most", num=True)] if with_bound else []),
        *([Column("margin", num=True), Column("equivalent")] if with_margin else []),
    ]
    rows = []
    for c in found:
        percent = is_share(record, c["task"])
        effect = resolvable.get((c["arm"], c["baseline"], c["task"]))
        band = null_band(c) or (None, None)
        row = [
            Cell(c["task"], c["task"]),
            Cell(f"{c['arm']} vs {c['baseline']}"),
            Cell(text.difference_text(c["difference"], percent=percent), c["difference"], href=f"#{study.anchor}"),
            interval_cell(c["low"], c["high"], percent=percent, signed=True),
            Cell(text.p_text(c["p"]), c["p"]),
            Cell(text.p_text(c["p_holm"]), c["p_holm"]),
            Cell(f"{c['seeds_same_sign']} of {c['seeds_compared']}", (c["seeds_same_sign"], c["seeds_compared"])),
            Cell("" if effect is None else text.size_text(effect, percent=percent), effect),
            verdict_cell(c["verdict"]),
        ]
        draws = c.get("num_draws") if null_band(c) else None
        row += [interval_cell(*band, percent=percent, signed=True), *plain(draws)] if with_null else []
        row += [_bound(c, percent=percent)] if with_bound else []
        row += [*_margin(c, percent=percent)] if with_margin else []
        rows.append(row)
    return Table(name, caption, columns, rows)


def _bound(c: Record, *, percent: bool) -> Cell:
    size = c.get("no_larger_than")
    return Cell("") if size is None else Cell(text.size_text(size, percent=percent), size)


def _margin(c: Record, *, percent: bool) -> Sequence[Cell]:
    if not c.get("margin"):
        return [Cell(""), Cell("")]
    equivalent = c.get("equivalent")
    word = "" if equivalent is None else ("equivalent" if equivalent else "not shown")
    return [Cell(text.size_text(c["margin"], percent=percent), c["margin"]), Cell(word, word, look="quiet")]


def _words(record: Mapping[str, Any]) -> list[str]:
    cells = record["num_cells"]
    counts = [f"{cells.get('done', 0)} of {cells['expected']} cells are done"]
    counts += [f"{len(record['failures'])} left out"] if record["failures"] else []
    counts += [f"{len(record['missing'])} not run"] if record["missing"] else []
    counts += (
        [f"attempts that failed before the last of their cell: {n}"] if (n := record.get("num_failed_attempts")) else []
    )
    if record.get("mixed_code"):
        counts.append(f"cells of {', '.join(record['mixed_code'])} ran different code and should be run again")
    return [f"{record['name']}: {'; '.join(counts)}."]
