"""Bench: the training step of a user's model shape beside plain transformers + PEFT, same work, in one run.

Each side runs in fresh processes, one after the other and in turn, so that neither sees the other's memory and slow
drifts of the machine meet both. A speed counts only when both sides compute the same loss; rounding is told from a fault by
the loss in fp32.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.memory import Memory
from ssmtune.models import model_location
from ssmtune.quantized import QuantizeConfig
from ssmtune.records import new_record

Side = Literal["ssmtune", "transformers+peft"]
SIDES: tuple[Side, ...] = ("ssmtune", "transformers+peft")

LOSS_LIMITS = {
    # Both sides sum in different orders. fp32: a few roundings per layer of a loss near ln(vocabulary).
    "float32": 1e-5,
    # bf16: activations are rounded in other places, 2^-8 each; the mean over thousands of tokens averages that out.
    "bfloat16": 1e-3,
}
"""How far the first losses of the two sides may differ, relatively. A missing term costs 1e-2 and more.

In bf16 rounding alone differs by more in a model with random weights whose logits are large: see `compare_losses`."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class BenchConfig:
    """What is measured. A config .json as `model` gets random weights; `repeats` is the number of processes per side."""

    model: str
    recipe: str = "all+core"
    rank: int = pydantic.Field(default=16, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    tokens_per_step: int = pydantic.Field(default=2048, ge=2)
    row_length: int = pydantic.Field(default=512, ge=2)
    num_steps: int = pydantic.Field(default=5, ge=1)
    """Steps that are timed in a row."""
    repeats: int = pydantic.Field(default=3, ge=1)
    memory: Memory = "fast"
    """What is kept for the backward pass (`memory`); for anything but "fast" the peer recomputes every layer."""
    quantize: QuantizeConfig | None = None
    """What of the base is in 4 bits, on both sides."""
    documents: int | None = pydantic.Field(default=None, ge=8)
    """Mean length of short documents; None is whole rows. Ours packs them into the rows, the peer pads them (`bench_batch`)."""
    peer: bool = True
    """Whether transformers + PEFT runs too."""


def bench(config: BenchConfig, *, on_message: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure and return the record: tokens/s with median and spread, peak memory, first step, share of the floor.

    The floor is the time of the model's frozen matrix products alone, forward and input gradient, measured on this
    machine at this shape: no step that computes every product can be faster.
    Nothing is written. `status` is "failed" when the two sides disagree about the loss or ours leaves a tensor without
    gradient. Raises `ConfigError` for a shape that cannot be run, `CheckFailed` when our own side does not finish.
    """
    if config.tokens_per_step % config.row_length:
        raise ConfigError(
            f"tokens_per_step {config.tokens_per_step} is no multiple of row_length {config.row_length}. "
            "Give whole rows, for example --tokens-per-step 2048 --row-length 512."
        )
    if config.documents is not None and config.documents > config.row_length:
        raise ConfigError(
            f"documents {config.documents}: a document of mean length is longer than a row of {config.row_length} tokens. "
            "Give longer rows (--row-length) or a smaller mean."
        )
    model_location(config.model)
    runs: dict[Side, list[dict[str, Any]]] = {side: [] for side in SIDES if config.peer or side == "ssmtune"}
    for repeat in range(config.repeats):
        for side in runs:
            if any("error" in run for run in runs[side]):
                continue
            runs[side].append(_run_side(config, side))
            on_message(f"{repeat + 1} of {config.repeats}: {side}: {_describe(runs[side][-1])}")
    problem = runs["ssmtune"][0].get("error")
    if problem is not None:
        raise CheckFailed(f"bench {config.model}: ssmtune's own side did not finish: {problem}.")
    # Padding is work and no use: with documents, a token counts when it is part of one.
    sides = {side: summarise(found, runs["ssmtune"][0]["useful_tokens"]) for side, found in runs.items()}
    parity = compare_losses(runs)
    if not parity["ok"] and config.quantize is None:
        on_message("the first losses differ; what is the loss in fp32?")
        exact = _run_side(config, "exact")
        parity = compare_losses(runs, exact.get("first_loss")) | ({"error": exact["error"]} if "error" in exact else {})
    dead = runs["ssmtune"][0]["dead"]
    record = new_record(
        "benchmark",
        config=asdict(config),
        status="done" if parity["ok"] and not dead else "failed",
        shape=runs["ssmtune"][0]["shape"],
        sides=sides,
        ratio=speed_ratio(runs),
        floor=_floor(runs, sides["ssmtune"]),
        parity=parity,
        runs={side: list(found) for side, found in runs.items()},
    )
    # The children saw the device and its backends; this process may not have asked for it.
    record["environment"]["device"] = runs["ssmtune"][0]["device"]
    if record["status"] == "done" and record["environment"]["dirty"]:
        record["status"] = "provisional"
    return record


def _run_side(config: BenchConfig, side: Side | Literal["exact"]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        request, answer = Path(directory) / "request.json", Path(directory) / "answer.json"
        request.write_text(json.dumps({"config": asdict(config), "side": side, "answer": str(answer)}))
        done = subprocess.run(
            [sys.executable, "-m", "ssmtune.bench_side", str(request)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": f"process ended with {done.returncode}: {last}"}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def summarise(runs: Sequence[Mapping[str, Any]], tokens_per_step: int) -> dict[str, Any]:
    """Return one side's figures: medians over all timed steps, the range of the runs' medians, and what it ran on.

    `tokens_per_step` are those that count; `processed_tokens` are all that the side ran through the model.
    """
    failed = [run["error"] for run in runs if "error" in run]
    if failed:
        return {"error": failed[0]}
    medians = [statistics.median(run["step_s"]) for run in runs]
    step_s = statistics.median(s for run in runs for s in run["step_s"])
    return {
        "tokens_per_s": tokens_per_step / step_s,
        "tokens_per_s_range": [tokens_per_step / max(medians), tokens_per_step / min(medians)],
        "step_s": step_s,
        "first_step_s": statistics.median(run["first_step_s"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "processed_tokens": runs[0]["processed_tokens"],
        "num_trained": runs[0]["num_trained"],
        "dead": runs[0]["dead"],
        "operations": "; ".join(dict.fromkeys(run["operations"] for run in runs)),
        "components": {
            name: statistics.median(run["components"].get(name, 0.0) for run in runs) * step_s
            for name in runs[0]["components"]
        },
    }


def speed_ratio(runs: Mapping[Side, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Return how many times faster ours is, paired by repeat: median and range; None without a finished peer."""
    peer = runs.get("transformers+peft", ())
    if not peer or any("error" in run for run in peer):
        return None
    ratios = [
        statistics.median(theirs["step_s"]) / statistics.median(ours["step_s"])
        for ours, theirs in zip(runs["ssmtune"], peer, strict=True)
    ]
    return {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def compare_losses(runs: Mapping[Side, Sequence[Mapping[str, Any]]], exact: float | None = None) -> dict[str, Any]:
    """Return the first losses of the sides, which see the same weights and tokens, and whether they agree.

    `exact` is that loss in fp32. Sides that differ by more than the limit agree where ours is within the limit of it, or
    no farther from it than the peer's: then the difference is how the peer rounds.
    """
    first = {side: found[0].get("first_loss") for side, found in runs.items()}
    ours, theirs = first["ssmtune"], first.get("transformers+peft")
    limit = LOSS_LIMITS[runs["ssmtune"][0]["shape"]["dtype"]]
    difference = None if theirs is None else abs(ours - theirs) / abs(theirs)
    ok = difference is None or difference <= limit
    away = None
    if exact is not None:
        away = {side: abs(loss - exact) / abs(exact) for side, loss in first.items() if loss is not None}
        ok = ok or away["ssmtune"] <= max(limit, away.get("transformers+peft", 0.0))
    return {"losses": first, "difference": difference, "limit": limit, "exact": exact, "from_exact": away, "ok": ok}


def _floor(runs: Mapping[Side, Sequence[Mapping[str, Any]]], ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrix-product floor in seconds a step, and the share of our step that it is; None with packed experts."""
    floors = [run["floor_s"] for run in runs["ssmtune"]]
    if None in floors:
        return None
    floor_s = statistics.median(floors)
    return {"step_s": floor_s, "share": floor_s / ours["step_s"]}


def _describe(run: Mapping[str, Any]) -> str:
    if "error" in run:
        return str(run["error"])
    return f"{run['useful_tokens'] / statistics.median(run['step_s']):,.0f} tokens/s"
