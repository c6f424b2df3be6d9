"""Memory and time of `ssmtune merge` on a model of full size with random weights, beside a plain copy of the same files.

Run from the repository root: python benchmarks/merge.py CONFIG.json [--scratch DIRECTORY]
Writes records/export/merge-3b.json, from which docs/export.md is rendered. The base, the adapter and the merged model lie
in the scratch directory while it runs (twice the model's size and a half) and are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ssmtune import adapter_files
from ssmtune.attach import AdaptedModel
from ssmtune.base_digest import digest_of_samples
from ssmtune.base_stream import NAMES, SHARD_BYTES
from ssmtune.checkpoint import ShardWriter, read_checkpoint
from ssmtune.models import load_config, weightless
from ssmtune.plan import make_plan
from ssmtune.records import new_record, write_json
from ssmtune.weight_units import Units

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "records/export/merge-3b.json"
RECIPE, RANK = "all+core", 16

CHILD = """
import json, resource, sys, time
from importlib import import_module
from pathlib import Path
start = time.time()
merge_to = import_module("ssmtune.merge").merge_to
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin, cpu = time.time(), time.process_time()
result = merge_to(sys.argv[1], Path(sys.argv[3]), model=sys.argv[2])
print(json.dumps({"seconds": time.time() - begin, "cpu_seconds": time.process_time() - cpu,
    "import_seconds": begin - start, "import_rss_bytes": imported * 1024,
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "in_memory": result["in_memory"],
    "dtype": result["dtype"], "survival": result["survival"], "edited": len(result["rounding"]),
    "worst": max(result["rounding"], key=lambda row: row["max"])}))
"""


def write_base(config_path: Path, directory: Path) -> None:
    """Write a checkpoint of the config with random bf16 weights, tensor by tensor."""
    directory.mkdir()
    fields = json.loads(config_path.read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    write_json(directory / "config.json", fields)
    model = weightless(load_config(str(directory)), dtype=torch.bfloat16)
    tensors = dict(model.named_parameters())
    spec = {name: (NAMES[p.dtype], tuple(p.shape)) for name, p in tensors.items()}
    writer = ShardWriter(directory, spec, max_bytes=SHARD_BYTES)
    # One block of numbers, again and again from another place: drawing 3 billion would take longer than what is measured.
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for i, (name, parameter) in enumerate(tensors.items()):
        source, left = block.roll(i * 997), parameter.numel()
        while left:
            writer.write(name, source[:left], parameter.numel() - left)
            left -= min(left, len(source))
    writer.finish()


def write_adapter(base: Path, directory: Path) -> None:
    """Write an adapter of the base with random values, without its weights in memory."""
    config = load_config(str(base))
    units = Units(weightless(config, dtype=torch.bfloat16), read_checkpoint(base))
    digest = digest_of_samples(units.in_order(units.samples(units.dtypes)))
    model = weightless(config, dtype=torch.bfloat16)
    adapted = AdaptedModel(model, make_plan(model, RECIPE, rank=RANK), digest=digest)
    trained = {id(p) for p in adapted.trained_parameters().values()}
    generator = torch.Generator().manual_seed(1)
    for module in adapted.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in trained:
                value = torch.randn(parameter.shape, generator=generator) * 0.02
                module._parameters[name] = torch.nn.Parameter(value)
    adapter_files.write(adapted, directory, step=1, run_id="benchmark")


def copy_once(base: Path, target: Path) -> dict[str, float]:
    """Seconds, and those of the processor, to copy the base's weights to the same disk, until they are on it."""
    target.mkdir()
    start, cpu = time.time(), time.process_time()
    for path in base.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    measured = {"seconds": time.time() - start, "cpu_seconds": time.process_time() - cpu}
    shutil.rmtree(target)
    return measured


def merge_once(adapter: Path, base: Path, out: Path) -> dict[str, Any]:
    """Run the merge in a process of its own and return what it measured of itself."""
    command = [sys.executable, "-W", "error::UserWarning:ssmtune", "-c", CHILD, str(adapter), str(base), str(out)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    facts: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return facts


def main() -> int:
    """Measure once and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--scratch", type=Path, default=None, help="where the files lie while this runs")
    parser.add_argument(
        "--reuse", type=Path, default=None, help="a directory with base and adapter of an interrupted run"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="ssmtune-merge-") as name:
        scratch = Path(name)
        total = sum(p.numel() for p in weightless(load_config(str(arguments.config))).parameters())
        free = shutil.disk_usage(scratch).free
        if free < 6 * total:
            print(f"{scratch}: {free / 1e9:.0f} GB free; this needs {6 * total / 1e9:.0f} GB.", file=sys.stderr)
            return 2
        if arguments.reuse:
            (arguments.reuse / "base").rename(scratch / "base")
            (arguments.reuse / "adapter").rename(scratch / "adapter")
        else:
            write_base(arguments.config, scratch / "base")
            write_adapter(scratch / "base", scratch / "adapter")
        num_bytes = sum(entry.num_bytes for entry in read_checkpoint(scratch / "base").values())
        load = os.getloadavg()[0]
        before = copy_once(scratch / "base", scratch / "copy")
        merged = merge_once(scratch / "adapter", scratch / "base", scratch / "merged")
        shutil.rmtree(scratch / "merged")
        after = copy_once(scratch / "base", scratch / "copy")
    largest = max(p.numel() for p in weightless(load_config(str(arguments.config))).parameters())
    config = {"model": arguments.config.name, "recipe": RECIPE, "rank": RANK, "dtype": "bfloat16", "weights": "random"}
    facts = {
        "load_average": load,
        "total": total,
        "bytes": num_bytes,
        "largest_tensor": largest,
        "copies": [before, after],
        "merge": merged,
    }
    write_json(RECORD, new_record("export", config=config, **facts))
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
