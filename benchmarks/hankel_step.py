"""CPU time of a training step with Hankel branches beside one with LoRA of equal count.

    python benchmarks/hankel_step.py --out records/bench/hankel-step-cpu.json

Every side is checked first: the states against the recurrence in double precision. Sides take turns, step by step, and CPU
time of one thread is compared, so that other programs on the machine weigh on all sides alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ssmtune.attach import AdaptedModel, attach
from ssmtune.models import auto_class
from ssmtune.ops.modal_scan import Backend, modal_states
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import new_record, write_json

WIDTH, INNER, NUM_LAYERS, ORDER, RANK = 256, 512, 2, 24, 16
LENGTHS = (512, 1024, 2048, 4096)
NUM_STEPS = {512: 7, 1024: 7, 2048: 5, 4096: 3}
PARITY = 2e-5
"""Relative error of the fp32 states: 4,096 sums and 64 products in a row, each off by half an eps."""

SIDES = {
    "lora": Edit(method="lora", select=("mlp.down",), options={"rank": RANK, "alpha": 2.0 * RANK}),
    "parallel": Edit(method="parallel", select=("block.mlp",), options={"order": ORDER}),
    "hankel, transform": Edit(method="hankel", select=("block.mlp",), options={"order": ORDER}),
    "hankel, scan": Edit(method="hankel", select=("block.mlp",), options={"order": ORDER, "backend": "scan"}),
    "hankel, complex, transform": Edit(
        method="hankel", select=("block.mlp",), options={"order": ORDER, "complex_modes": True}
    ),
    "hankel, complex, scan": Edit(
        method="hankel", select=("block.mlp",), options={"order": ORDER, "complex_modes": True, "backend": "scan"}
    ),
}


def make_side(edit: Edit) -> AdaptedModel:
    """A small Llama with one kind of adapter, ready to train."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(LENGTHS),
    )
    model: Any = auto_class(config).from_config(config, dtype=torch.float32)
    adapted = attach(model, make_plan(model, Recipe(name=edit.method, edits=(edit,))))
    adapted.train()
    return adapted


def worst_error(backend: Backend, *, complex_modes: bool) -> float:
    """Relative error of the fp32 states over the longest row, against the recurrence step by step in double precision."""
    size = torch.exp(-torch.logspace(-4, 0, 8, dtype=torch.float64))
    a = torch.polar(size, torch.arange(8.0, dtype=torch.float64)) if complex_modes else size
    u = torch.randn(1, max(LENGTHS), 8, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    a32, u32 = (x.to(torch.complex64 if complex_modes else torch.float32) for x in (a, u))
    state, states = torch.zeros_like(u[:, 0]), []
    for step in range(u.shape[1]):
        state = a32.to(a.dtype) * state + u32[:, step].to(u.dtype)
        states.append(state)
    truth = torch.stack(states, 1)
    error = (modal_states(a32, u32, backend=backend) - truth).abs().square().mean(1).sqrt()
    return float((error / truth.abs().square().mean(1).sqrt()).max())


def step_seconds(side: AdaptedModel, ids: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass."""
    started = time.process_time()
    side(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    taken = time.process_time() - started
    side.zero_grad()
    return taken


def main() -> None:
    """Check, then time, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parity = {
        f"{'complex' if complex_modes else 'real'}, {backend}": worst_error(backend, complex_modes=complex_modes)
        for complex_modes in (False, True)
        for backend in ("fft", "scan")
    }
    wrong = {name: error for name, error in parity.items() if error > PARITY}
    if wrong:
        raise SystemExit(f"no timing: states are wrong by {wrong}, allowed is {PARITY}")
    sides = {name: make_side(edit) for name, edit in SIDES.items()}
    timings: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for length in LENGTHS:
        ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(NUM_STEPS[length] + 1):
            for name, side in sides.items():
                taken = step_seconds(side, ids)
                if turn:  # the first warms up
                    found[name].append(taken)
        base = statistics.median(found["lora"])
        for name, values in found.items():
            median = statistics.median(values)
            timings[name][str(length)] = {"step_cpu_s": values, "median": median, "of_lora": median / base}
            print(f"T {length} {name}: {median * 1000:.0f} ms, {median / base:.3f} of LoRA", flush=True)
    record = new_record(
        "benchmark",
        config={"width": WIDTH, "inner": INNER, "num_layers": NUM_LAYERS, "order": ORDER, "rank": RANK, "rows": 1},
        num_trained={name: side.plan.trainable for name, side in sides.items()},
        parity=parity,
        timings_by_length=timings,
    )
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
