"""The training step of published shapes, one `ssmtune bench` after the other: each writes its record as soon as it is done.

    python benchmarks/training.py --plan
    python benchmarks/training.py --out records/bench --only 'granite*fast' --seconds 300

Run from the repository root. A measurement that runs out of memory or fails is recorded as such, and the next one starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ssmtune.bench import BenchConfig, bench, summarise
from ssmtune.bench_side import measure
from ssmtune.config import decode
from ssmtune.errors import SsmtuneError
from ssmtune.families.base import find_family
from ssmtune.memory import Memory
from ssmtune.models import load_config
from ssmtune.quantized import QuantizeConfig
from ssmtune.records import new_record, write_json

SHAPES = Path(__file__).resolve().parent / "shapes"
GRANITE = "granite-4.0-h-micro"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One record: a shape at rows x length. With `lengths`, one row of each of them in turn, ours alone, in one record."""

    shape: str
    row_length: int = 8192
    rows: int = 1
    memory: Memory = "fast"
    peer: bool = True
    quantize: bool = False
    documents: int | None = None
    lengths: tuple[int, ...] = ()
    num_steps: int = 3
    repeats: int = 1

    @property
    def name(self) -> str:
        """What the record's file is called, before the device."""
        if self.lengths:
            return f"{self.shape}-lengths"
        name = f"{self.shape}-{self.rows}x{self.row_length}-{self.memory}"
        return name + ("-nf4" if self.quantize else "") + (f"-documents{self.documents}" if self.documents else "")


MEASUREMENTS = (
    # The most important first. Those whose figure must hold run in three processes a side.
    Measurement(shape=GRANITE, repeats=3),
    Measurement(shape=GRANITE, memory="small"),
    Measurement(shape=GRANITE, documents=300),
    # The peer knows no setting between keeping everything and nothing.
    Measurement(shape=GRANITE, memory="balanced", peer=False),
    Measurement(shape=GRANITE, quantize=True),
    Measurement(shape=GRANITE, lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536), peer=False),
    Measurement(shape=GRANITE, rows=4, row_length=2048),
    Measurement(shape="nemotron-h-4b"),
    Measurement(shape="falcon-h1-1.5b"),
    Measurement(shape="mamba2-2.7b"),
    Measurement(shape="qwen3.5-4b"),
    Measurement(shape="qwen3.5-4b", memory="small"),
    Measurement(shape=GRANITE, row_length=32768, memory="small", num_steps=1),
)

BILLIONS = {GRANITE: 3.2, "nemotron-h-4b": 4.5, "falcon-h1-1.5b": 1.6, "mamba2-2.7b": 2.7, "qwen3.5-4b": 4.2}
SPEED = {"fast": 28_000.0, "balanced": 22_000.0, "small": 19_000.0}
"""Rough tokens/s of ours on an H200 for a billion parameters times 3.2: for the plan's estimates, no figure of a record."""
PEER_SPEED = 4_500.0
"""The same of the peer without kernels of its own, recomputing; with kernels it takes a fourth of the time."""
START_SECONDS = 15.0
"""Imports, random weights, the floor and the profile of one process."""


def estimate(measurement: Measurement) -> float:
    """Rough seconds on an H200."""
    scale = 3.2 / BILLIONS[measurement.shape]
    if measurement.lengths:
        steps = sum(m.row_length * (4 + 3 * m.num_steps) for m in each_length(measurement)) / SPEED["small"]
        return START_SECONDS + 6 * len(measurement.lengths) + steps
    tokens = measurement.rows * measurement.row_length * (4 + 3 * measurement.num_steps)
    ours = START_SECONDS + tokens / (SPEED[measurement.memory] * scale)
    theirs = START_SECONDS + tokens / (PEER_SPEED * scale) if measurement.peer else 0.0
    return measurement.repeats * (ours + theirs)


def each_length(measurement: Measurement) -> list[Measurement]:
    """A series of lengths as measurements of one, with more steps in a row where steps are short."""
    return [
        replace(measurement, lengths=(), row_length=n, num_steps=min(4, max(1, 32768 // n)))
        for n in measurement.lengths
    ]


def to_config(measurement: Measurement, model: str, device: str) -> BenchConfig:
    """The benchmark of a measurement that is no series of lengths."""
    fields = {
        "model": model,
        "device": device,
        "tokens_per_step": measurement.rows * measurement.row_length,
        "row_length": measurement.row_length,
        "num_steps": measurement.num_steps,
        "repeats": measurement.repeats,
        "memory": measurement.memory,
        "quantize": asdict(QuantizeConfig()) if measurement.quantize else None,
        "documents": measurement.documents,
        "peer": measurement.peer,
    }
    return decode(BenchConfig, fields, where=measurement.name)


def run_lengths(configs: list[BenchConfig]) -> Iterator[dict[str, Any]]:
    """Measure our side at each length in this process; once one runs out of memory, it and all longer ones recompute."""
    memory: Memory = configs[0].memory
    for config in configs:
        while True:
            entry: dict[str, Any] = {"length": config.row_length, "memory": memory}
            try:
                run = measure(replace(config, memory=memory), "ssmtune")
                entry |= {**summarise([run], run["useful_tokens"]), "first_loss": run["first_loss"]}
                entry |= {"operations": run["operations"], "shape": run["shape"], "device": run["device"]}
            except torch.OutOfMemoryError as error:
                entry["error"] = f"torch.OutOfMemoryError: {str(error).split('. ')[0]}"
            # The model and its graphs refer to each other, and the next one needs their memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if "error" not in entry or memory == "small":
                break
            memory = "small"
        yield entry


def measure_lengths(measurement: Measurement, model: str, device: str, out: Path, slug: str) -> dict[str, Any]:
    """Run a series of lengths in a process of its own, and write the record anew after each of them."""
    configs = [asdict(to_config(m, model, device)) for m in each_length(measurement)]
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(configs)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    config = {**configs[0], "benchmark": "lengths", "lengths": list(measurement.lengths)}
    record = new_record("benchmark", config=config, status="aborted", entries=[])
    for line in child.stdout:
        # Libraries print there as well.
        if not line.startswith('{"length":'):
            continue
        record["entries"].append(json.loads(line))
        record["environment"]["device"] = record["entries"][-1].get("device", record["environment"]["device"])
        write_json(out / f"{measurement.name}-{slug}.json", record)
    if child.wait() == 0:
        record["status"] = "provisional" if record["environment"]["dirty"] else "done"
    return record


def run_one(measurement: Measurement, model: str, device: str, out: Path, slug: str) -> dict[str, Any]:
    """Run one measurement, write its record and return it; one that failed has an `error`."""
    if measurement.lengths:
        record = measure_lengths(measurement, model, device, out, slug)
    else:
        config = to_config(measurement, model, device)
        try:
            record = bench(config, on_message=lambda message: print(f"  {message}", flush=True))
        except SsmtuneError as error:
            record = new_record("benchmark", config=asdict(config), status="failed", error=str(error))
    write_json(out / f"{measurement.name}-{slug}.json", record)
    return record


def toy(measurement: Measurement) -> Measurement:
    """The same measurement at sizes for a CPU."""
    lengths = tuple(n // 256 for n in measurement.lengths[:3])
    documents = None if measurement.documents is None else 16
    small = {"row_length": max(16, measurement.row_length // 128), "num_steps": 1, "repeats": 1}
    return replace(measurement, **small, lengths=lengths, documents=documents)  # type: ignore[arg-type]


def model_of(measurement: Measurement, directory: Path | None) -> str:
    """The shape's config file; with a directory, a tiny config of the same architecture that is written there."""
    path = SHAPES / f"{measurement.shape}.json"
    if directory is None:
        return os.path.relpath(path)
    config = load_config(str(path))
    tiny = next(
        c for c in find_family(config.model_type)[1].tiny_configs().values() if c.model_type == config.model_type
    )
    (directory / path.name).write_text(json.dumps(tiny.to_dict()))
    return str(directory / path.name)


def main() -> int:
    """Run what is asked for, in order. Returns 1 when a measurement failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("records/bench"), help="directory of the records")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names, * stands for anything")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after so many")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, help="processes a side, instead of the table's")
    parser.add_argument("--steps", type=int, help="steps timed in a row, instead of the table's")
    parser.add_argument("--memory", choices=("fast", "balanced", "small"), help="instead of the table's")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--toy", action="store_true", help="tiny shapes on a CPU, to try this script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        for entry in run_lengths(
            [decode(BenchConfig, fields, where="child") for fields in json.loads(arguments.child)]
        ):
            print(json.dumps(entry), flush=True)
        return 0
    given = {"repeats": arguments.repeats, "num_steps": arguments.steps, "memory": arguments.memory}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments.no_peer:
        changes["peer"] = False
    chosen = [m for m in MEASUREMENTS if any(fnmatch(m.name, pattern) for pattern in arguments.only)]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)}: names nothing. There are: {names()}")
    chosen = [replace(toy(m) if arguments.toy else m, **changes) for m in chosen]
    if arguments.plan:
        for measurement in chosen:
            sides = "ours and the peer" if measurement.peer else "ours"
            print(f"{measurement.name:50} {sides:18} x {measurement.repeats}  about {estimate(measurement):4.0f} s")
        print(f"{'':50} {'all':18}      about {sum(map(estimate, chosen)):4.0f} s")
        return 0
    device = "cpu" if arguments.toy else arguments.device
    slug = "cpu" if device == "cpu" else device_slug()
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as directory:
        for measurement in chosen:
            begun = time.monotonic()
            if begun - started > arguments.seconds:
                print(f"{measurement.name}: not started, {arguments.seconds:.0f} s are over", flush=True)
                continue
            model = model_of(measurement, Path(directory) if arguments.toy else None)
            record = run_one(measurement, model, device, arguments.out, slug)
            failed += record["status"] in ("failed", "aborted")
            taken, total = time.monotonic() - begun, time.monotonic() - started
            print(f"{measurement.name}: {record['status']}, {taken:.0f} s, {total:.0f} s in all", flush=True)
    return 1 if failed else 0


def names() -> str:
    """All measurements."""
    return ", ".join(m.name for m in MEASUREMENTS)


def device_slug() -> str:
    """The GPU's name as it stands in file names: "NVIDIA H200" is "h200"."""
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if word != "nvidia"), words[0])


if __name__ == "__main__":
    sys.exit(main())
