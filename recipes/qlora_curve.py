"""Does a base in 4 bits train as the base in full precision does? Loss curves of both on a bundled task.

Run from the repository root: python recipes/qlora_curve.py [--out FILE] [--seeds N] [--steps N]

All arms of a seed start from the same adapter values and see the same rows in the same order; nothing is tuned. After
training, the held-out loss of every arm is taken on the base that it was trained on, and on the original weights, which
is what a merge gives. Arms and comparisons are declared below and copied into the record.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ssmtune.attach import load
from ssmtune.config import decode
from ssmtune.models import load_tokenizer
from ssmtune.quantize import load_base
from ssmtune.quantized import QuantizationNote, QuantizeConfig
from ssmtune.records import new_record, write_json
from ssmtune.stats import mean_interval, paired_difference
from ssmtune.train import TrainConfig, train
from ssmtune.training_data import TrainingData, prepare_data

FULL = "full precision"
ARMS: dict[str, QuantizeConfig | None] = {
    FULL: None,
    "nf4": QuantizeConfig(),
    "nf4 and recurrent.out": QuantizeConfig(components=("attention", "recurrent", "mlp")),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every arm shares."""

    model: str = "tiny-granite-h"
    task: str = "classification"
    size: float = 0.02
    recipe: str = "all+core"
    rank: int = 8
    learning_rate: float = 1e-3
    num_steps: int = 60
    rows_per_step: int = 2
    seeds: int = 3


def train_config(setup: Setup, seed: int, quantize: QuantizeConfig | None, output: Path) -> TrainConfig:
    """The run of one arm and seed: one document a row, evaluated and saved once, at the end."""
    settings = {
        "model": setup.model,
        "output_dir": str(output),
        "data": {"task": setup.task, "size": setup.size, "packing": False},
        "recipe": setup.recipe,
        "lora": {"rank": setup.rank, "alpha": 2.0 * setup.rank},
        "optimizer": {"learning_rate": setup.learning_rate, "core_learning_rate": setup.learning_rate},
        "seed": seed,
        "max_steps": setup.num_steps,
        "num_evaluations": 1,
        "rows_per_step": setup.rows_per_step,
        "dtype": "float32",
        "quantize": None if quantize is None else asdict(quantize),
    }
    return decode(TrainConfig, settings, where="recipe")


def held_out_losses(model: Any, data: TrainingData) -> list[float]:
    """Mean cross entropy of each validation document's completion, in nats a token."""
    losses = []
    with torch.no_grad():
        for row in data.validation:
            ids, labels = (torch.tensor(row[name])[None] for name in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(float(F.cross_entropy(logits, labels[0, 1:], ignore_index=-100)))
    return losses


def run_arm(setup: Setup, seed: int, quantize: QuantizeConfig | None, data: TrainingData) -> dict[str, Any]:
    """Train one arm on one seed and return its curve and held-out losses."""
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationNote)
        config = train_config(setup, seed, quantize, Path(directory) / "run")
        record = train(config, on_message=lambda _: None, progress=False)
        adapter = Path(directory) / "run" / "adapter"
        bases = {"as trained": quantize} if quantize is None else {"as trained": quantize, "merged": None}
        found = {}
        for name, held in bases.items():
            adapted = load(load_base(setup.model, dtype="float32", quantize_config=held), adapter)
            found[name] = held_out_losses(adapted, data)
    quantization = record["quantization"]
    facts = ("bytes_before", "bytes_after", "parameters")
    return {
        "losses": [entry["loss"] for entry in record["history"]],
        "held_out": found,
        "trained": record["plan"]["trainable"],
        "weights": None if quantization is None else {name: quantization[name] for name in facts},
    }


def run_study(setup: Setup) -> dict[str, Any]:
    """Run every arm on every seed, and compare each arm in 4 bits with full precision."""
    tokenizer = load_tokenizer(setup.model)
    data = prepare_data(train_config(setup, 0, None, Path("unused")).data, tokenizer)
    arms: dict[str, Any] = {}
    for name, quantize in ARMS.items():
        untrained = held_out_losses(load_base(setup.model, dtype="float32", quantize_config=quantize).eval(), data)
        runs = [run_arm(setup, seed, quantize, data) for seed in range(setup.seeds)]
        held_out = {base: [run["held_out"][base] for run in runs] for base in runs[0]["held_out"]}
        arms[name] = {
            "trained": runs[0]["trained"],
            "weights": runs[0]["weights"],
            "losses": [run["losses"] for run in runs],
            "untrained": float(np.mean(untrained)),
            "held_out": held_out,
            "mean": {b: mean_interval([float(np.mean(row)) for row in rows]).to_dict() for b, rows in held_out.items()},
        }
        print(f"{name}: held-out loss {arms[name]['mean']['as trained']['mean']:.3f}", flush=True)
    reference = arms[FULL]["held_out"]["as trained"]
    comparisons = []
    for name, arm in arms.items():
        for base, rows in arm["held_out"].items() if name != FULL else ():
            result = paired_difference(rows, reference, seed=0)
            interval = {"difference": result.difference, "low": result.low, "high": result.high}
            comparisons.append({"arm": name, "base": base, "baseline": FULL, **interval})
    return {"arms": arms, "comparisons": comparisons, "data": data.summary}


def main() -> None:
    """Run the study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("records/studies/qlora-curve.json"))
    parser.add_argument("--seeds", type=int, default=Setup.seeds)
    parser.add_argument("--steps", type=int, default=Setup.num_steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setup = Setup(seeds=arguments.seeds, num_steps=arguments.steps)
    declared = {name: None if quantize is None else asdict(quantize) for name, quantize in ARMS.items()}
    started = time.time()
    # Before the run: it says which code runs, and under which declaration.
    record = new_record("synthetic", config={**asdict(setup), "arms": declared})
    if record["environment"]["dirty"]:
        record["status"] = "provisional"
    result = run_study(setup)
    cpu = time.process_time()
    write_json(arguments.out, {**record, **result, "seconds": time.time() - started, "cpu_seconds": cpu})


if __name__ == "__main__":
    main()
