"""Benchmarks of the training step: time by component beside the peer, throughput, memory, and the floor."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ssmtune.report import bars, text
from ssmtune.report.arms import Collection
from ssmtune.report.sections import Figure, Figures, Section
from ssmtune.report.sources import Record, Source
from ssmtune.report.tables import Cell, Column, Table

PEER = "transformers+peft"
FLOOR = "matrix products alone"
MAX_ERROR = 160
"""Characters of an error that are shown; the record has all of it."""


def speed(collection: Collection, figures: Figures) -> Section:
    """Every record of `ssmtune bench`: sides beside each other, and the time of a step by component."""
    found = _titled(collection)
    sides = [row for title, source in found.items() for row in _sides(title, source)]
    parts = [row for title, source in found.items() for row in _components(title, source)]
    columns = (
        Column("benchmark", wrap=True),
        Column("side"),
        Column("tokens/s", num=True),
        Column("range over repeats", parts=("low", "high")),
        Column("step", num=True),
        Column("first step", num=True),
        Column("peak memory", num=True),
        Column("share of the step that is the floor", num=True),
    )
    components = (Column("benchmark", wrap=True), Column("component"), Column("side"), Column("ms a step", num=True))
    others = [s.record for s in collection.of("benchmark") if "sides" not in s.record]
    words = [line for title, source in found.items() for line in _words(title, source.record)]
    if others:
        names = ", ".join(sorted(str(r["config"].get("benchmark") or "of single operations") for r in others))
        words.append(f"{len(others)} other benchmark record(s) here have no step to draw ({names}); see the records.")
    return Section(
        "speed",
        "Speed of a training step",
        words=words,
        tables=[Table("speed", "Throughput and memory", columns, sides)] if sides else [],
        figures=[made for title, source in found.items() for made in _figures(title, source.record, figures)],
        numbers=[Table("speed-components", "Time of a step by component", components, parts)] if parts else [],
        how="Each bar is the time that one component takes in one optimiser step, forward and backward, as a median "
        "over repeats. The floor is the time of the frozen matrix products alone on the same machine at the same "
        "shape: no step that computes every product can be faster. A ratio is called faster or slower only when "
        "every repeat says so.",
        empty="No benchmark of a training step among these records.",
    )


def _titled(collection: Collection) -> dict[str, Source]:
    """Records of `ssmtune bench` by the name of their file, or by what they measured where that is not known."""
    found: dict[str, Source] = {}
    for source in collection.sources:
        if source.record["kind"] == "benchmark" and {"sides", "shape"} <= set(source.record):
            title = PurePosixPath(source.file).name.split(".json")[0] or _shape(source.record)
            found[title if title not in found else f"{title}, {source.record['created']}"] = source
    return found


def _shape(record: Record) -> str:
    rows, length = record["shape"]["tokens"]
    recompute = ", recompute" if record["config"].get("recompute") else ""
    model = str(record["config"]["model"]).rsplit("/", 1)[-1]
    return f"{model}, {record['config']['recipe']}, {rows} x {length:,} tokens{recompute}"


def _finished(record: Record) -> dict[str, Mapping[str, Any]]:
    return {name: side for name, side in record["sides"].items() if "error" not in side}


def _sides(title: str, source: Source) -> list[list[Cell]]:
    record, floor = source.record, source.record["floor"]
    rows = []
    for name, side in record["sides"].items():
        head = [Cell(title, href=f"#{source.anchor}"), Cell(name)]
        if "error" in side:
            rows.append([*head, Cell("did not finish", None, look="failed"), *[Cell("")] * 5])
            continue
        low, high = side["tokens_per_s_range"]
        share = None if floor is None else floor["step_s"] / side["step_s"]
        rows.append(
            [
                *head,
                Cell(f"{side['tokens_per_s']:,.0f}", side["tokens_per_s"]),
                Cell(f"[{low:,.0f}, {high:,.0f}]" if low < high else "", (low, high)),
                Cell(f"{1000 * side['step_s']:,.1f} ms", side["step_s"]),
                Cell(f"{side['first_step_s']:.1f} s", side["first_step_s"]),
                Cell(text.bytes_text(side["peak_memory_bytes"]), side["peak_memory_bytes"]),
                Cell("" if share is None else f"{100 * share:.0f} %", share),
            ]
        )
    return rows


def _bars(record: Record) -> dict[str, dict[str, float]]:
    """Side -> component -> milliseconds, the slowest component of ours first; the floor is a side of one bar."""
    sides = _finished(record)
    ours = next(iter(sides.values()))["components"] if sides else {}
    order = sorted(
        {part for side in sides.values() for part in side["components"]}, key=lambda part: -ours.get(part, 0.0)
    )
    bars = {
        name: {part: 1000 * side["components"][part] for part in order if part in side["components"]}
        | {"whole step": 1000 * side["step_s"]}
        for name, side in sides.items()
    }
    if record["floor"] is not None:
        bars[FLOOR] = {"whole step": 1000 * record["floor"]["step_s"]}
    return bars


def _components(title: str, source: Source) -> list[list[Cell]]:
    name_cell = Cell(title, href=f"#{source.anchor}")
    bars = _bars(source.record)
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    return [
        [name_cell, Cell(part), Cell(name), Cell(f"{bar[part]:,.1f}", bar[part])]
        for part in parts
        for name, bar in bars.items()
        if part in bar
    ]


def _figures(title: str, record: Record, figures: Figures) -> list[Figure]:
    parts, sides = _bars(record), _finished(record)
    note = f"{_shape(record)}; {record['environment']['device']}"
    made = [figures.add(bars.bars(parts, axis="ms a step"), title, "speed-components", note)]
    if sides:
        speeds = {name: {"tokens/s": side["tokens_per_s"]} for name, side in sides.items()}
        memory = {name: {"GiB": side["peak_memory_bytes"] / 2**30} for name, side in sides.items()}
        made.append(figures.add(bars.bars(speeds, axis="tokens a second"), f"{title}: throughput", "speed"))
        made.append(figures.add(bars.bars(memory, axis="peak memory in GiB"), f"{title}: peak memory", "speed"))
    return made


def _words(title: str, record: Record) -> Sequence[str]:
    """What the record says about itself: ratio, floor, parity, dead tensors, the peer's kernels, failures."""
    lines = []
    if record["ratio"] is not None:
        low, high = record["ratio"]["range"]
        verdict = "faster" if low > 1 else ("slower" if high < 1 else "no difference")
        known = (
            f"{low:.2f} to {high:.2f} over repeats: {verdict}" if low < high else "one repeat, so no spread is known"
        )
        lines.append(
            f"ssmtune takes {record['ratio']['median']:.2f} times the steps of {PEER} in the same time ({known})"
        )
    if record["floor"] is not None:
        lines.append(f"the frozen matrix products alone are {100 * record['floor']['share']:.0f} % of ssmtune's step")
    parity = record["parity"]
    if parity["difference"] is not None:
        agree = "agree" if parity["ok"] else "DISAGREE, so the speeds mean nothing"
        lines.append(
            f"first losses {agree} (relative difference {parity['difference']:.1e}, limit {parity['limit']:.0e})"
        )
    if parity.get("from_exact"):
        away = ", ".join(f"{side} by {apart:.1e}" for side, apart in parity["from_exact"].items())
        lines.append(f"from the loss in fp32 they differ: {away}")
    for name, side in record["sides"].items():
        if "error" in side:
            lines.append(f"{name} did not finish: {textwrap.shorten(side['error'], MAX_ERROR, placeholder=' ...')}")
        elif side.get("dead"):
            lines.append(f"{len(side['dead'])} trained tensors of {name} did not move, for example {side['dead'][0]}")
        if name == PEER and "operations" in side:
            lines.append(f"{name} ran on {side['operations']}")
    lines += [str(record["note"]).rstrip(".")] if record.get("note") else []
    status = "" if record["status"] == "done" else f" ({record['status']})"
    return [f"{title}{status}: {'; '.join(lines)}."] if lines else []
