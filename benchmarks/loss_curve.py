"""Does the fast path train as the plain path does? Loss curves of both on real text, beside two runs of the plain path.

    python benchmarks/loss_curve.py tokens ids.npy TEXT...
    python benchmarks/loss_curve.py run ids.npy --out records/bench/loss-curve-h200.json

Three arms train the same weights on the same rows in the same order, as `ssmtune train` does (its trainer, its optimiser
settings, no dropout):

fast    rewritten layers and the loss without logits, what training uses on a GPU
plain   the model's own layers on ssmtune's operations (`attach(fast="off")`) and its own head
split   plain again, with each row's two halves as two rows that are accumulated

Each half begins a new document, so that `split` computes what `plain` computes: only gradients are summed in two parts,
each rounded by itself. Anybody takes the two for the same training. A perturbed start would be a smaller twin, since bf16
rounds it away; another kernel a larger one. What `split` differs by is the noise that `fast` is held to.
"""

from __future__ import annotations

import argparse
import gc
import lzma
import math
import os
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from ssmtune.attach import Fast, attach
from ssmtune.bench import BenchConfig
from ssmtune.bench_side import base_model
from ssmtune.errors import ConfigError
from ssmtune.head_loss import HeadLoss
from ssmtune.memory import Memory, keep_activations
from ssmtune.models import load_tokenizer
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.records import file_sha256, new_record, write_json
from ssmtune.sft import EditTrainer, make_sft_config
from ssmtune.train import OptimizerConfig, TrainConfig, peak_memory
from ssmtune.training_data import DataConfig, TrainingData

TOKENIZER = "tiny-granite-h"
SEPARATOR = "\n<|doc|>\n"
"""Between the documents of a file of text."""

Arm = Literal["fast", "plain", "split"]
ARMS: tuple[Arm, ...] = ("fast", "plain", "split")

LIMIT = 3.0
RULE = (
    f"within noise: the mean of |fast - plain| over all steps is at most {LIMIT:g} times that of |split - plain|, and the mean "
    "of fast - plain over the last quarter, with its sign, is at most the mean of |split - plain| there"
)
"""Fixed before a run. One pair of runs is one draw of a noise that grows along the run, hence the factor; a path that
trains worse is worse on the same side, hence the second half."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all arms share."""

    model: str = "benchmarks/shapes/granite-4.0-h-micro.json"
    device: Literal["cpu", "cuda"] = "cuda"
    recipe: str = "all+core"
    rank: int = 16
    num_steps: int = 200
    row_length: int = 8192
    memory: Memory = "fast"
    seed: int = 0


def write_tokens(texts: Sequence[Path], out: Path, limit: int) -> int:
    """Write at most `limit` token ids of files of text (.txt or .txt.xz) to a .npy, each document behind the end token."""
    tokenizer = load_tokenizer(TOKENIZER)
    end = int(tokenizer.eos_token_id)
    ids: list[int] = []
    for path in texts:
        payload = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        for document in payload.decode("utf-8").split(SEPARATOR):
            if len(ids) >= limit:
                break
            ids += [end, *tokenizer(document, add_special_tokens=False)["input_ids"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, np.array(ids[:limit], dtype=np.uint16 if len(tokenizer) < 2**16 else np.int32), allow_pickle=False)
    return len(ids[:limit])


def make_rows(ids: np.ndarray, length: int, num: int) -> list[dict[str, Any]]:
    """Return `num` rows of `length` ids in order, with the lengths of their documents; a row begins a document.

    The first of `ids` is the token that every document begins with. Raises `ConfigError` where there are too few.
    """
    if len(ids) < num * length:
        raise ConfigError(
            f"{num} rows of {length} tokens need {num * length:,} ids and there are {len(ids):,}. "
            "Give more text to the 'tokens' command, or fewer --steps."
        )
    rows = []
    for index in range(num):
        part = ids[index * length : (index + 1) * length].astype(np.int64)
        starts = [0, *(int(at) for at in np.flatnonzero(part == ids[0]) if at > 0)]
        lengths = [b - a for a, b in zip(starts, [*starts[1:], length], strict=True)]
        rows.append({"input_ids": part.tolist(), "labels": part.tolist(), "seq_lengths": lengths})
    return rows


def joined(halves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every two rows as one."""
    return [
        {name: [*one[name], *two[name]] for name in one} for one, two in zip(halves[::2], halves[1::2], strict=True)
    ]


class CurveTrainer(EditTrainer):
    """Keeps the loss of every step as the device computed it; the history's is rounded."""

    def __init__(self, *args: Any, deadline: float, **options: Any) -> None:
        self.losses: list[torch.Tensor] = []
        super().__init__(*args, **options)
        self.add_callback(_Deadline(deadline))

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """As the trainer's; each loss is the micro-batch's part of its step's."""
        loss: torch.Tensor = super().training_step(*args, **options)
        self.losses.append(loss.detach().float())
        return loss

    def curve(self) -> list[float]:
        """Loss of each whole step."""
        each = self.args.gradient_accumulation_steps
        losses = torch.stack(self.losses).tolist() if self.losses else []
        return [math.fsum(losses[at : at + each]) for at in range(0, len(losses) - each + 1, each)]


class _Deadline(TrainerCallback):
    """Stops the training when the time is over."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() > self.deadline:
            control.should_training_stop = True


def run_arm(
    model: Any, plan: Plan, arm: Arm, setup: Setup, ids: np.ndarray, deadline: float, found: dict[str, Any]
) -> None:
    """Train one arm from the model's weights, put the model back, and fill in its curve and what it took, stopped or not."""
    from datasets import Dataset

    started = time.monotonic()
    halves = make_rows(ids, setup.row_length // 2, 2 * setup.num_steps)
    rows = halves if arm == "split" else joined(halves)
    torch.manual_seed(setup.seed)
    # By itself training rewrites nothing on a CPU.
    fast: Fast = "off" if arm != "fast" else "require" if setup.device == "cpu" else "auto"
    adapted = attach(model, plan, fast=fast)
    tokenizer = load_tokenizer(TOKENIZER)
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainConfig(
            model=setup.model,
            output_dir=directory,
            data=DataConfig(task="unused"),
            recipe=setup.recipe,
            seed=setup.seed,
            max_steps=setup.num_steps,
            rows_per_step=1,
            num_accumulated=2 if arm == "split" else 1,
        )
        keep_activations(adapted, setup.memory)
        args = make_sft_config(settings, setup.num_steps, model.dtype, directory=Path(directory))
        args.save_strategy = args.eval_strategy = "no"
        args.logging_strategy = "no"
        args.train_sampling_strategy = "sequential"
        data = TrainingData(
            train=Dataset.from_list(rows),
            validation=Dataset.from_list(rows[:1]),
            tokenizer=tokenizer,
            pad_token_id=int(tokenizer.pad_token_id or 0),
            summary={},
            messages=[],
        )
        trainer = CurveTrainer(
            adapted,
            args,
            data,
            optimizer_config=OptimizerConfig(),
            run_id="curve",
            progress=False,
            deadline=deadline,
        )
        if arm != "fast" or setup.device == "cpu":
            trainer.head_loss = HeadLoss(adapted, bypass=arm == "fast")
        prepared = time.monotonic()
        try:
            with warnings.catch_warnings():
                # What TRL and torch warn about here is what `ssmtune train` silences as well.
                warnings.simplefilter("ignore")
                trainer.train()
        finally:
            found["losses"] = trainer.curve()
            found["seconds"] = {"prepare": prepared - started, "train": time.monotonic() - prepared}
            found["peak_memory_bytes"] = peak_memory()
            found["operations"] = adapted.fast_block
            found["head"] = "without logits" if trainer.head_loss.reason is None else "the model's own"
            adapted.detach()
            # Trainer, callbacks and layers refer to each other, and the next arm needs their memory.
            del trainer, adapted
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def compare(curves: dict[str, list[float]]) -> dict[str, Any] | None:
    """Return how far fast and split are from plain over the steps that all three made, and the verdict of `RULE`."""
    num = min(len(curves.get(arm, ())) for arm in ARMS)
    if num < 4:
        return None
    gaps = {arm: [a - b for a, b in zip(curves[arm][:num], curves["plain"], strict=False)] for arm in ("fast", "split")}
    last = num - num // 4
    found: dict[str, Any] = {
        arm: {
            "mean": statistics.mean(map(abs, gap)),
            "largest": max(map(abs, gap)),
            "first": abs(gap[0]),
            "last_quarter": statistics.mean(gap[last:]),
            "last_quarter_mean": statistics.mean(map(abs, gap[last:])),
            "final_loss": statistics.mean(curves[arm][last:num]),
        }
        for arm, gap in gaps.items()
    }
    found["plain"] = {"final_loss": statistics.mean(curves["plain"][last:num])}
    within = found["fast"]["mean"] <= LIMIT * found["split"]["mean"]
    unbiased = abs(found["fast"]["last_quarter"]) <= found["split"]["last_quarter_mean"]
    return {"num_steps": num, **found, "rule": RULE, "within_noise": within and unbiased}


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Make a termination an exception, so that what was measured is written."""

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(setup: Setup, tokens: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Run all arms, and write the record at the end or with what there is when it is stopped."""
    started = time.monotonic()
    ids = np.load(tokens, allow_pickle=False)
    facts = {"tokens": file_sha256(tokens)[:16], "optimizer": asdict(OptimizerConfig()), "rule": RULE}
    record = new_record("benchmark", config={"benchmark": "loss-curve", **asdict(setup), **facts}, status="aborted")
    record |= {"arms": {}, "comparison": None}
    try:
        with stopped_by_signal():
            torch.manual_seed(setup.seed)
            config = BenchConfig(model=setup.model, recipe=setup.recipe, rank=setup.rank, device=setup.device)
            model = base_model(config)
            plan = make_plan(model, named_recipe(setup.recipe, rank=setup.rank, alpha=2.0 * setup.rank))
            if int(ids.max()) >= model.config.get_text_config().vocab_size:
                raise ConfigError(
                    f"{tokens}: holds id {int(ids.max())}, beyond the model's vocabulary. Use another file."
                )
            record["shape"] = {"parameters": plan.total, "trainable": plan.trainable, "dtype": str(model.dtype)[6:]}
            record["model_seconds"] = time.monotonic() - started
            print(f"model: {record['model_seconds']:.0f} s", flush=True)
            for arm in ARMS:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                found = record["arms"][arm] = {"losses": []}
                run_arm(model, plan, arm, setup, ids, started + seconds, found)
                speed = len(found["losses"]) * setup.row_length / found["seconds"]["train"]
                print(
                    f"{arm}: {len(found['losses'])} steps, loss {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}, "
                    f"{found['seconds']['prepare']:.0f} + {found['seconds']['train']:.0f} s, {speed:,.0f} tokens/s",
                    flush=True,
                )
                if time.monotonic() - started > seconds:
                    break
            if sum(len(found["losses"]) for found in record["arms"].values()) == len(ARMS) * setup.num_steps:
                record["status"] = "provisional" if record["environment"]["dirty"] else "done"
    finally:
        record["comparison"] = compare({arm: found["losses"] for arm, found in record["arms"].items()})
        record["seconds"] = time.monotonic() - started
        write_json(out, record)
    return record


def main() -> None:
    """Write token ids, or run the arms and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text to token ids, with the bundled tokenizer")
    tokens.add_argument("out", type=Path)
    tokens.add_argument("texts", type=Path, nargs="+")
    tokens.add_argument("--limit", type=int, default=Setup.num_steps * Setup.row_length)
    curve = commands.add_parser("run", help="train the three arms")
    curve.add_argument("tokens", type=Path)
    curve.add_argument("--out", type=Path, required=True)
    curve.add_argument("--model", default=Setup.model)
    curve.add_argument("--device", choices=("cuda", "cpu"), default=Setup.device)
    curve.add_argument("--steps", type=int, default=Setup.num_steps)
    curve.add_argument("--row-length", type=int, default=Setup.row_length)
    curve.add_argument("--memory", choices=("fast", "balanced", "small"), default=Setup.memory)
    curve.add_argument("--seconds", type=float, default=float("inf"), help="stop training after so many")
    arguments = parser.parse_args()
    if arguments.command == "tokens":
        num = write_tokens(arguments.texts, arguments.out, arguments.limit)
        print(f"{arguments.out}: {num:,} ids")
        return
    setup = Setup(
        model=arguments.model if arguments.model == TOKENIZER else os.path.relpath(arguments.model),
        device=arguments.device,
        num_steps=arguments.steps,
        row_length=arguments.row_length,
        memory=arguments.memory,
    )
    record = run(setup, arguments.tokens, arguments.out, arguments.seconds)
    found = record["comparison"]
    if found is not None:
        print(
            f"mean |fast - plain| {found['fast']['mean']:.2e}, |split - plain| {found['split']['mean']:.2e}; "
            f"largest {found['fast']['largest']:.2e}, {found['split']['largest']:.2e}; within noise: {found['within_noise']}"
        )


if __name__ == "__main__":
    main()
