"""The tables of docs/performance.md that come from `ssmtune bench`, benchmarks/training.py, benchmarks/loss_curve.py and
benchmarks/small_terms.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssmtune.records import read_record

BENCH = Path(__file__).resolve().parent.parent / "records/bench"
NO_RECORD = "No record yet."
PEER = "transformers+peft"
MEMORY = ("fast", "balanced", "small")
NUM_KERNELS = 12
NUM_STRETCHES = 8

Record = dict[str, Any]


def records(wanted: Callable[[Record], bool]) -> dict[str, Record]:
    """The records that `wanted` chooses, by name; of one measurement on one device the newest, in the order of shapes."""
    newest: dict[tuple[Any, ...], tuple[str, Record]] = {}
    for path in sorted(BENCH.glob("*.json")):
        record = read_record(path, kind="benchmark")
        if not wanted(record):
            continue
        key = _key(record)
        if key not in newest or newest[key][1]["created"] < record["created"]:
            newest[key] = path.stem, record
    return dict(sorted(newest.values(), key=lambda item: _order(item[1])))


def _key(record: Record) -> tuple[Any, ...]:
    config = record["config"]
    # A model's file may have been called otherwise; its size is its own.
    model = record.get("shape", {}).get("parameters", _model(record))
    names = ("benchmark", "row_length", "tokens_per_step", "documents", "quantize", "recipe", "rank", "lengths")
    memory = config.get("memory", "fast")
    return (model, *(str(config.get(name)) for name in names), memory, record["environment"]["device"])


def _order(record: Record) -> tuple[Any, ...]:
    config = record["config"]
    tokens = config.get("tokens_per_step", 0)
    return (_model(record), tokens, -config["row_length"], MEMORY.index(config.get("memory", "fast")))


def _model(record: Record) -> str:
    return Path(record["config"]["model"]).stem.replace("_", "-")


def _steps(record: Record) -> bool:
    """Whether it is a whole step of `ssmtune bench`, finished or not."""
    config = record["config"]
    return {"model", "tokens_per_step"} <= set(config) and "benchmark" not in config


def _plain_steps(record: Record) -> bool:
    config = record["config"]
    return _steps(record) and config.get("documents") is None and config.get("quantize") is None


def steps() -> str:
    """Speed, memory and first step of both sides of every benchmark of the training step in whole rows."""
    rows = []
    for name, record in records(_plain_steps).items():
        head = [f"[{_model(record)}](../records/bench/{name}.json)", record["environment"]["device"], _tokens(record)]
        if "sides" not in record:
            rows.append([*head, "ssmtune", _failure(record), *[""] * 5])
            continue
        ours = record["sides"]["ssmtune"]
        for side, found in _sides(record).items():
            row = [*head, _side(side, found)]
            if "error" in found:
                rows.append([*row, _failure(found), *[""] * 5])
                continue
            share = "" if record["floor"] is None else f"{record['floor']['step_s'] / found['step_s']:.0%}"
            dead = f"{len(found['dead'])} of {found['num_trained']}"
            left_out = ours["num_trained"] - found["num_trained"]
            dead += f", {left_out} left out" if left_out else ""
            factor = _factor(record) if side == "ssmtune" else ""
            memory = f"{found['peak_memory_bytes'] / 2**30:.1f} GiB"
            rows.append([*row, _speed(record, side), factor, share, memory, _first_step(record, side), dead])
    headings = ["shape", "device", "tokens", "side", "tokens/s (slowest-fastest step)", "times the other side"]
    return _table([*headings, "of the floor's speed", "peak memory", "first step", "did not move"], rows)


def _first_step(record: Record, side: str) -> str:
    """The first step of a side's processes, the fastest and the slowest."""
    seconds = sorted(run["first_step_s"] for run in record["runs"][side])
    return f"{seconds[0]:.1f} s" if len(seconds) == 1 else f"{seconds[0]:.1f}-{seconds[-1]:.1f} s"


def components() -> str:
    """Milliseconds of our step by component."""
    found = {name: r for name, r in records(_plain_steps).items() if "sides" in r}
    parts = {name: record["sides"]["ssmtune"]["components"] for name, record in found.items()}
    columns = list(dict.fromkeys(part for components in parts.values() for part in components))
    rows = [
        [_model(record), record["environment"]["device"], _tokens(record)]
        + [f"{parts[name].get(column, 0) * 1000:,.1f}" for column in columns]
        for name, record in found.items()
    ]
    return _table(["shape", "device", "tokens", *columns], rows)


def lengths() -> str:
    """Our step at one row of each length."""
    rows = []
    for name, record in records(lambda r: r["config"].get("benchmark") == "lengths").items():
        head = [f"[{_model(record)}](../records/bench/{name}.json)", record["environment"]["device"]]
        done = [entry for entry in record["entries"] if "error" not in entry]
        for entry in record["entries"]:
            row = [*head, f"1 x {entry['length']:,}", entry["memory"]]
            if "error" in entry:
                rows.append([*row, _failure(entry), "", "", ""])
                continue
            speed, step = f"{entry['tokens_per_s']:,.0f}", f"{entry['step_s'] * 1000:,.0f} ms"
            share = f"{entry['tokens_per_s'] / done[0]['tokens_per_s']:.2f}"
            rows.append([*row, speed, share, step, f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB"])
    headings = ["shape", "device", "tokens", "memory", "tokens/s", "of the first length's", "step", "peak memory"]
    return _table(headings, rows)


def packed() -> str:
    """Short documents, packed on our side and padded on the other."""
    rows = []
    for name, record in records(lambda r: _steps(r) and r["config"].get("documents") is not None).items():
        head = [f"[{_model(record)}](../records/bench/{name}.json)", record["environment"]["device"]]
        if "sides" not in record:
            rows.append([*head, "", "ssmtune", _failure(record), *[""] * 5])
            continue
        run = record["runs"]["ssmtune"][0]
        head.append(f"{run['num_documents']}, of {run['useful_tokens'] / run['num_documents']:,.0f} in the mean")
        for side, found in _sides(record).items():
            if "error" in found:
                rows.append([*head, _side(side, found), _failure(found), *[""] * 5])
                continue
            padding = f"{1 - run['useful_tokens'] / found['processed_tokens']:.0%}"
            factor = _factor(record) if side == "ssmtune" else ""
            memory = f"{found['peak_memory_bytes'] / 2**30:.1f} GiB"
            speed, processed = _speed(record, side), f"{found['processed_tokens']:,}"
            rows.append([*head, _side(side, found), speed, factor, processed, padding, memory])
    headings = ["shape", "device", "documents", "side", "documents' tokens/s (slowest-fastest)", "times the other side"]
    return _table([*headings, "tokens computed a step", "of which padding", "peak memory"], rows)


def qlora() -> str:
    """Steps on a base in 4 bits, beside the same step on the base in full precision."""
    full = {_key(r): r for r in records(_plain_steps).values() if "sides" in r}
    rows = []
    for name, record in records(lambda r: _steps(r) and r["config"].get("quantize") is not None).items():
        head = [f"[{_model(record)}](../records/bench/{name}.json)", record["environment"]["device"], _tokens(record)]
        if "sides" not in record:
            rows.append([*head, "ssmtune", _failure(record), *[""] * 4])
            continue
        unquantized = full.get(_key({**record, "config": {**record["config"], "quantize": None}}), {})
        held = record["shape"]["quantization"]
        base = f"{held['bytes_after'] / 2**30:.2f} of {held['bytes_before'] / 2**30:.2f} GiB"
        for side, found in _sides(record).items():
            if "error" in found:
                rows.append([*head, _side(side, found), _failure(found), *[""] * 4])
                continue
            same = unquantized.get("sides", {}).get(side, {})
            share = f"{found['tokens_per_s'] / same['tokens_per_s']:.2f}" if "tokens_per_s" in same else ""
            memory = f"{found['peak_memory_bytes'] / 2**30:.1f} GiB"
            factor = _factor(record) if side == "ssmtune" else ""
            rows.append([*head, _side(side, found), _speed(record, side), share, factor, base, memory])
    headings = [
        "shape",
        "device",
        "tokens",
        "side",
        "tokens/s (slowest-fastest step)",
        "of its speed in full precision",
    ]
    return _table([*headings, "times the other side", "base", "peak memory"], rows)


def curve() -> str:
    """Loss curves of the fast path and of runs of the plain one, how far each two are apart, and the verdicts."""
    parts = []
    for name, record in records(lambda r: r["config"].get("benchmark") == "loss-curve").items():
        config, num = record["config"], record["config"]["num_steps"]
        shown = [round(part * (num - 1) / 4) for part in range(5)]
        rows, without = [], []
        for arm, facts in record["arms"].items():
            losses = facts["losses"]
            if "refused" in facts:
                without.append(f"Without {arm}: {facts['refused']}")
            if not losses:
                continue
            marks = [f"{losses[step]:.4f}" if step < len(losses) else "" for step in shown]
            seconds = facts["seconds"]["train"]
            speed = len(losses) * config["row_length"] / seconds
            rows.append([arm, str(facts["operations"]), *marks, f"{speed:,.0f}", f"{seconds:.0f} s"])
        at = [f"step {step + 1}" for step in shown]
        words = [
            f"[{_model(record)}](../records/bench/{name}.json), {num} steps of 1 x {config['row_length']:,} tokens of text, "
            f"{record['environment']['device']}."
        ]
        if record["status"] == "aborted":
            words.append("Stopped before all steps were made.")
        found = record["comparison"] or {"pairs": {}, "verdicts": {}}
        gaps, verdicts = found["pairs"], found["verdicts"]
        for verdict, found in verdicts.items():
            words.append(f"Over {found['num_steps']} steps fast is **{'' if found['holds'] else 'not '}{verdict}**.")
        rules = "\n".join(f"- {found['rule'][0].upper()}{found['rule'][1:]}." for found in verdicts.values())
        runs = _table(["run", "on", *at, "tokens/s, all of training", "training"], rows)
        keys = ("first", "mean", "largest", "last_quarter_mean", "last_quarter")
        columns = ["first step", "mean", "largest", "mean of the last quarter", "the same with its sign"]
        cells = [[pair, f"{gap['num_steps']}", *(f"{gap[key]:.1e}" for key in keys)] for pair, gap in gaps.items()]
        apart = _table(["losses apart", "steps", *columns], cells) if cells else ""
        parts += [" ".join([*words, *without]), rules, runs, apart]
    return "\n\n".join(part for part in parts if part) or NO_RECORD


def exactness() -> str:
    """How far each run is from the one in fp32, with its sign, in stretches of the steps."""
    parts = []
    for record in records(lambda r: r["config"].get("benchmark") == "loss-curve").values():
        curves = {arm: facts["losses"] for arm, facts in record["arms"].items()}
        num = record["config"]["num_steps"]
        if not {"exact", "plain"} <= {arm for arm, losses in curves.items() if len(losses) == num}:
            continue
        apart = {
            arm: [loss - exact for loss, exact in zip(losses, curves["exact"], strict=True)]
            for arm, losses in curves.items()
            if arm != "exact" and len(losses) == num
        }
        bounds = sorted({round(part * num / NUM_STRETCHES) for part in range(NUM_STRETCHES + 1)})
        stretches = list(zip(bounds, bounds[1:], strict=False))
        rows = [
            [f"{arm} - exact", *(f"{statistics.mean(gaps[a:b]):+.1e}" for a, b in stretches)]
            + [f"{statistics.correlation(gaps, apart['plain']):.3f}"]
            for arm, gaps in apart.items()
        ]
        headings = ["mean with its sign", *(f"steps {a + 1}-{b}" for a, b in stretches)]
        parts.append(_table([*headings, "correlation with plain - exact"], rows))
    return "\n\n".join(parts) or NO_RECORD


def small_terms() -> str:
    """Share of an adapter's term that arrives in a bf16 output, by the term's size."""
    record = read_record(BENCH / "small-terms-cpu.json", kind="benchmark")
    shares = record["shares"]
    rows = [[side, *(f"{entry['share']:.2f}" for entry in found.values())] for side, found in shares.items()]
    sizes = [f"2^{exponent}" for exponent in next(iter(shares.values()))]
    return _table(["share that arrives of a term of", *sizes], rows)


def profile() -> str:
    """Milliseconds of a step by kind of kernel, for each side of the records that have a profile."""
    found = _profiles()
    kinds: dict[str, float] = {}
    for *_, kernels in found:
        for kind, value in kernels["kinds"].items():
            kinds[kind] = max(kinds.get(kind, 0.0), value)
    order = sorted(kinds, key=lambda kind: -kinds[kind])
    rows = [
        [_model(record), record["environment"]["device"], _tokens(record), side]
        + [f"{kernels['kinds'][kind]:,.1f}" if kind in kernels["kinds"] else "-" for kind in order]
        + [f"{sum(kernels['kinds'].values()):,.1f}", f"{record['sides'][side]['step_s'] * 1000:,.1f}"]
        for record, side, kernels in found
    ]
    return _table(["shape", "device", "tokens", "side", *order, "all kernels", "timed step"], rows)


def kernels() -> str:
    """The slowest kernels of both sides of the first record that has them."""
    found = _profiles()
    first = next((record for record, side, _ in found if side == PEER), found[0][0] if found else None)
    if first is None:
        return NO_RECORD
    rows = [
        [side, f"`{kernel['name'][:70]}`", kernel["kind"], f"{kernel['count']:,}", f"{kernel['ms']:,.2f}"]
        for record, side, kernels in found
        if record is first
        for kernel in kernels["slowest"][:NUM_KERNELS]
    ]
    words = f"{_model(first)}, {_tokens(first)}, {first['environment']['device']}:"
    return words + "\n\n" + _table(["side", "kernel", "kind", "times a step", "ms a step"], rows)


def _profiles() -> list[tuple[Record, str, Record]]:
    """Record, side and kernels of every finished side with a profile."""
    return [
        (record, side, record["runs"][side][0]["kernels"])
        for record in records(_steps).values()
        for side, found in (_sides(record) if "sides" in record else {}).items()
        if "error" not in found and "kernels" in record["runs"][side][0]
    ]


def _sides(record: Record) -> dict[str, Record]:
    """What each side reached; nothing where the two computed different losses."""
    if record["parity"]["ok"]:
        return dict(record["sides"])
    return {side: {"error": "losses differ"} for side in record["sides"]}


def _tokens(record: Record) -> str:
    """Rows, their length, the precision and what is out of the ordinary."""
    config = record["config"]
    rows, precision = config["tokens_per_step"] // config["row_length"], record.get("shape", {}).get("dtype", "")
    words = f"{rows} x {config['row_length']:,} {precision}".strip()
    memory = config.get("memory", "fast")
    words += "" if memory == "fast" else f", memory: {memory}"
    words += "" if config.get("quantize") is None else ", 4 bits"
    return words + ("" if config.get("documents") is None else f", documents of {config['documents']}")


def _side(side: str, found: Record) -> str:
    """A side; the other one with the operations that it called, which the oldest records do not hold."""
    return (
        side if side != PEER or "error" in found else f"{side} on {found.get('operations', 'operations not recorded')}"
    )


def _speed(record: Record, side: str) -> str:
    """Tokens a second with those of the slowest and the fastest timed step."""
    found = record["sides"][side]
    times = [s for run in record["runs"][side] for s in run["step_s"]]
    tokens = found["tokens_per_s"] * statistics.median(times)
    return f"{found['tokens_per_s']:,.0f} ({tokens / max(times):,.0f}-{tokens / min(times):,.0f})"


def _factor(record: Record) -> str:
    return "" if record["ratio"] is None else f"{record['ratio']['median']:.1f}"


def _failure(found: Record) -> str:
    return next((word for word in ("out of memory", "losses differ") if word in found["error"]), "failed")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NO_RECORD
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
