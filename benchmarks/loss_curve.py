"""Does the fast path train as the plain path does? Loss curves of both on real text, beside other runs of the plain path.

    python benchmarks/loss_curve.py tokens ids.npy TEXT...
    python benchmarks/loss_curve.py run ids.npy --out records/bench/loss-curve-h200.json
    python benchmarks/loss_curve.py run ids.npy --arms plain,mamba_ssm --out part.json
    python benchmarks/loss_curve.py merge one.json part.json --out whole.json

Arms train the same weights on the same rows in the same order, as `ssmtune train` does (its trainer, its optimiser
settings, no dropout), with the same adapters:

fast       rewritten layers and the loss without logits, what training uses on a GPU
plain      the model's own layers on ssmtune's operations (`attach(fast="off")`) and its own head
split      plain again, with each row's two halves as two rows that are accumulated
mamba_ssm  plain with the convolution and the scan that transformers takes from causal_conv1d and mamba_ssm
reference  plain with ssmtune's operations in plain PyTorch; slow, and its layers are computed again in the backward pass
exact      plain with the same weights and everything else in fp32, autocast off; slow, and recomputed likewise
reseeded   plain from another draw of the adapters' first values
repeat     fast a second time

Measures of noise, each with a rule that is in the record before an arm runs.

Each half begins a new document, so that `split` computes what `plain` computes: only gradients are summed in two parts,
each rounded by itself. Anybody takes the two for the same training, and they share every kernel of the forward pass bit
for bit, which any other set of kernels does not.

`mamba_ssm` is the plain path as people train it elsewhere: two of the model's operations round at other places. It is
kept off mamba_ssm's function for a whole layer, which reads a projection's weight past its adapter and would train
something else. What `repeat` differs by is what the fast path does not repeat of itself.

`reseeded` is the noise of a training run as its reader knows it: everything alike but the draw of the adapters.

`exact` is what all others round: a path that is as near to it as the plain one trains as well, wherever it rounds.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import lzma
import math
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from ssmtune.attach import Fast, attach
from ssmtune.bench import BenchConfig
from ssmtune.bench_profile import called_operations
from ssmtune.bench_side import FUSED_LAYERS, base_model
from ssmtune.errors import ConfigError, MissingDependency, RecordError, SsmtuneError, nearest
from ssmtune.families.base import find_family
from ssmtune.head_loss import HeadLoss
from ssmtune.memory import Memory, keep_activations
from ssmtune.models import load_tokenizer
from ssmtune.operations import recurrent_modules
from ssmtune.ops.backend import SWITCH
from ssmtune.ops.seam import rebind, restore
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.records import file_sha256, new_record, read_record, write_json
from ssmtune.sft import EditTrainer, make_sft_config
from ssmtune.train import OptimizerConfig, TrainConfig, peak_memory
from ssmtune.training_data import DataConfig, TrainingData

TOKENIZER = "tiny-granite-h"
SEPARATOR = "\n<|doc|>\n"
"""Between the documents of a file of text."""

Arm = Literal["exact", "plain", "split", "mamba_ssm", "reseeded", "reference", "fast", "repeat"]
ARMS: tuple[Arm, ...] = get_args(Arm)
DEFAULT_ARMS: tuple[Arm, ...] = ("fast", "plain", "mamba_ssm", "split", "reseeded", "repeat")
"""In the order in which they run, should the time end."""

FAST_ARMS = ("fast", "repeat")

SLOW_ARMS = ("exact", "reference")
"""They keep nothing for the backward pass."""


@dataclass(frozen=True)
class Rule:
    """Holds `fast` to how far another run is from the run that both are compared with."""

    other: Arm
    factor: float
    base: Arm = "plain"

    def describe(self, name: str) -> str:
        """The rule in words."""
        noise = f"|{self.other} - {self.base}|"
        return (
            f"{name}: the mean of |fast - {self.base}| over all steps is at most {self.factor:g} times that of {noise}, and "
            f"the mean of fast - {self.base} over the last quarter, with its sign, is at most the mean of {noise} there"
        )


RULES = {
    "within noise": Rule("split", 3.0),
    "within the noise between kernels": Rule("mamba_ssm", 2.0),
    "as near to fp32 as the plain path": Rule("plain", 1.25, base="exact"),
    "within the noise between draws of the adapters": Rule("reseeded", 1.0),
}
"""Each fixed before a run of the arm that it names. Records of the first were there when the second was written, and of
both when the third and the fourth were; a curve of the arm that a rule is about never was. The first two did not hold then.

One pair of runs is one draw of a noise that grows along the run, hence a factor; a path that trains worse is worse on
the same side, hence the second half.

The second factor is a judgement and no quantile. Were the fast path one more set of kernels like any other, its distance
from plain and that of `mamba_ssm` would be two draws of one kind, and a factor of 1 would be missed every other time;
how much such draws scatter takes several sets of kernels to say, and there is one. It is below the first rule's since both
distances share the plain run and are of one kind. The yardstick is short: `mamba_ssm` rounds elsewhere in convolution
and scan only, `fast` in every layer. And it is blind to a bias below this noise.

The third needs no such yardstick: plain and fast are each one draw around the same curve, and of two that round equally
much either may be the nearer, hence the little above 1.

The fourth says how much of what a user sees between two runs is the path: it is the widest, and it alone would let a
path pass that trains worse by less than luck moves a run.
"""


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
    """Keeps the loss of every step as the device computed it; the history's is rounded.

    `operations` is what the steps run on; where it is not given, it is what the first one called.
    """

    def __init__(self, *args: Any, deadline: float, operations: str | None, **options: Any) -> None:
        self.losses: list[torch.Tensor] = []
        self.operations = operations
        super().__init__(*args, **options)
        self.add_callback(_Deadline(deadline))

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """As the trainer's; each loss is the micro-batch's part of its step's."""
        step = partial(super().training_step, *args, **options)
        found: list[torch.Tensor] = []
        if self.operations is None:
            self.operations = called_operations(lambda: found.append(step()))
        loss = found[0] if found else step()
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


Replacements = list[tuple[nn.Module, dict[str, Callable[..., Any]]]]


def package_functions(model: Any) -> Replacements:
    """Recurrent modules, and what their forward needs to run on the packages' functions that transformers took for it.

    That is to decline a function that is a whole layer. Raises `MissingDependency` where a function is transformers' own
    in plain PyTorch.
    """
    found: Replacements = []
    for module in recurrent_modules(model, find_family(model.config.model_type)[1]):
        forward = inspect.unwrap(type(module).forward)
        names = forward.__code__.co_names
        missing = {name: package for name in names if (package := _missing_package(forward.__globals__.get(name)))}
        if missing:
            packages = sorted(set(missing.values()))
            raise MissingDependency(
                f"{type(module).__name__}: transformers runs {', '.join(missing)} in plain PyTorch, since "
                f"{' and '.join(packages)} cannot be imported here. 'pip install {' '.join(packages)}', or leave the arm out."
            )
        found.append((module, dict.fromkeys(set(FUSED_LAYERS) & set(names), lambda *_, **__: None)))
    return found


def _missing_package(function: Any) -> str | None:
    """The package that transformers did not find for a function, and has one of its own for; else None."""
    while inspect.isfunction(function):
        held = inspect.getclosurevars(function).nonlocals
        if held.get("is_new_implementation") is False:
            return str(held["package"])
        function = vars(function).get("__wrapped__")
    return None


@contextmanager
def operations_of(arm: Arm) -> Iterator[None]:
    """While the block runs, ssmtune's operations are plain PyTorch for the arm that asks for it."""
    before = os.environ.get(SWITCH)
    if arm == "reference":
        os.environ[SWITCH] = "reference"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


@contextmanager
def weights_of(arm: Arm, model: nn.Module) -> Iterator[None]:
    """While the block runs, the model's weights are in fp32 for the arm that asks for it; the way there and back is exact."""
    dtypes = [(p, p.dtype) for p in model.parameters()] if arm == "exact" else []
    try:
        for p, _ in dtypes:
            p.data = p.data.float()
        yield
    finally:
        for p, dtype in dtypes:
            p.data = p.data.to(dtype)


def run_arm(
    model: Any, plan: Plan, arm: Arm, setup: Setup, ids: np.ndarray, deadline: float, found: dict[str, Any]
) -> None:
    """Train one arm from the model's weights, put the model back, and fill in its curve and what it took, stopped or not.

    Raises `MissingDependency` before anything is trained where the arm's kernels are not installed.
    """
    from datasets import Dataset

    started = time.monotonic()
    functions = package_functions(model) if arm == "mamba_ssm" else []
    is_fast = arm in FAST_ARMS
    halves = make_rows(ids, setup.row_length // 2, 2 * setup.num_steps)
    rows = halves if arm == "split" else joined(halves)
    torch.manual_seed(setup.seed + (arm == "reseeded"))
    # By itself training rewrites nothing on a CPU.
    fast: Fast = "off" if not is_fast else "require" if setup.device == "cpu" else "auto"
    memory: Memory = "small" if arm in SLOW_ARMS else setup.memory
    adapted = attach(model, plan, fast=fast)
    found["memory"] = memory
    if arm != "exact":
        found["base_digest"] = adapted.base_digest
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
        keep_activations(adapted, memory)
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
            operations=adapted.fast_block if is_fast else None,
        )
        if not is_fast or setup.device == "cpu":
            trainer.head_loss = HeadLoss(adapted, bypass=is_fast)
        # Behind the trainer, which tries the head on two tokens: kernels that choose by size should see a row first.
        for module, replacements in functions:
            restore(module)
            rebind(module, replacements)
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
            found["operations"] = trainer.operations
            found["head"] = "without logits" if trainer.head_loss.reason is None else "the model's own"
            adapted.detach()
            if memory != "fast":
                model.activation_checkpointing_disable()


def apart(one: Sequence[float], two: Sequence[float]) -> dict[str, Any]:
    """Return how far the losses of two runs are apart over the steps that both made; `last_quarter` is one - two, signed."""
    gap = [a - b for a, b in zip(one, two, strict=False)]
    last = gap[len(gap) - len(gap) // 4 :]
    return {
        "num_steps": len(gap),
        "first": abs(gap[0]),
        "mean": statistics.mean(map(abs, gap)),
        "largest": max(map(abs, gap)),
        "last_quarter": statistics.mean(last),
        "last_quarter_mean": statistics.mean(map(abs, last)),
    }


def compare(curves: dict[str, list[float]]) -> dict[str, Any] | None:
    """Return how far each two runs are apart, and the verdict of each rule whose runs are there; None without two runs.

    A rule is judged over the steps that its three runs made. Runs of fewer than four steps do not count.
    """
    curves = {arm: curves[arm] for arm in ARMS if len(curves.get(arm, ())) >= 4}
    if len(curves) < 2:
        return None
    pairs = {f"{two} - {one}": apart(curves[two], curves[one]) for one, two in itertools.combinations(curves, 2)}
    verdicts = {}
    for name, rule in RULES.items():
        needed: tuple[Arm, ...] = ("fast", rule.base, rule.other)
        if not set(needed) <= set(curves):
            continue
        num = min(len(curves[arm]) for arm in needed)
        fast, noise = (apart(curves[arm][:num], curves[rule.base][:num]) for arm in ("fast", rule.other))
        is_small = fast["mean"] <= rule.factor * noise["mean"]
        is_unbiased = abs(fast["last_quarter"]) <= noise["last_quarter_mean"]
        verdicts[name] = {"rule": rule.describe(name), "num_steps": num, "holds": is_small and is_unbiased}
    finals = {arm: statistics.mean(curve[len(curve) - len(curve) // 4 :]) for arm, curve in curves.items()}
    return {"pairs": pairs, "verdicts": verdicts, "final_losses": finals}


def _compare_arms(record: dict[str, Any]) -> dict[str, Any] | None:
    return compare({arm: found["losses"] for arm, found in record["arms"].items()})


def _status(record: dict[str, Any]) -> str:
    """Done where every arm of the record made all steps or was refused."""
    num = record["config"]["num_steps"]
    if any(len(found["losses"]) < num and "refused" not in found for found in record["arms"].values()):
        return "aborted"
    return "provisional" if record["environment"]["dirty"] else "done"


def merge(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write one record of the arms of several, compared anew: arms may run at the same time, each on a device of its own.

    Of an arm in two records the longer curve is kept. Raises `RecordError` where records differ in config, tokens, shape,
    weights or software, or where both hold an arm in full.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        record = read_record(path, kind="benchmark")
        if record["config"].get("benchmark") != "loss-curve":
            raise RecordError(f"{path}: is no record of benchmarks/loss_curve.py. Name records of its 'run'.")
        merged = _with_arms_of(merged, record, path) if merged else record
    merged["status"] = _status(merged)
    merged["comparison"] = _compare_arms(merged)
    write_json(out, merged)
    return merged


def _with_arms_of(one: dict[str, Any], two: dict[str, Any], path: Path) -> dict[str, Any]:
    """The first record with the arms of the second, which is at `path`."""
    first, second = _identity(one), _identity(two)
    # A record of `exact` alone has no digest of the weights as they are.
    unknown = {"weights"} if not (first["weights"] and second["weights"]) else set()
    differing = [name for name in first if first[name] != second[name] and name not in unknown]
    if differing:
        found = "; ".join(f"{name} is {second[name]!r} there and {first[name]!r} before" for name in differing)
        raise RecordError(f"{path}: was not run as the records before it: {found}. Run its arms anew.")
    arms = dict(one["arms"])
    for arm, facts in two["arms"].items():
        if arm in arms and len(arms[arm]["losses"]) == len(facts["losses"]) > 0:
            raise RecordError(f"{path}: holds {arm!r}, which a record before it holds as well. Merge only one of them.")
        if arm not in arms or len(arms[arm]["losses"]) < len(facts["losses"]):
            arms[arm] = facts
    devices = " and ".join(dict.fromkeys(facts["device"] for facts in arms.values()))
    return {
        **one,
        "created": max(one["created"], two["created"]),
        "environment": {**one["environment"], "device": devices},
        "arms": arms,
        "seconds": one["seconds"] + two["seconds"],
    }


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What records must share for their arms to be compared, by name."""
    digests = sorted({found["base_digest"] for found in record["arms"].values() if "base_digest" in found})
    software = {name: value for name, value in record["environment"].items() if name != "device"}
    shape = {f"shape.{name}": value for name, value in record.get("shape", {}).items()}
    return {**record["config"], **software, **shape, "weights": digests}


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


def run(setup: Setup, tokens: Path, out: Path, seconds: float, arms: Sequence[Arm] = DEFAULT_ARMS) -> dict[str, Any]:
    """Run the arms, and write the record at the end or with what there is when it is stopped.

    An arm that cannot run here (kernels not installed, memory that does not suffice) says why, and the next one starts.
    """
    started = time.monotonic()
    ids = np.load(tokens, allow_pickle=False)
    rules = [rule.describe(name) for name, rule in RULES.items()]
    facts = {"tokens": file_sha256(tokens)[:16], "optimizer": asdict(OptimizerConfig()), "rules": rules}
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
            for arm in arms:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                found = record["arms"][arm] = {"losses": [], "device": record["environment"]["device"]}
                try:
                    with operations_of(arm), weights_of(arm, model):
                        run_arm(model, plan, arm, setup, ids, started + seconds, found)
                except (MissingDependency, torch.OutOfMemoryError) as error:
                    found["refused"] = str(error).partition("\n")[0]
                # Trainer, callbacks and layers refer to each other, and the next arm needs their memory.
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                print(_describe(arm, found, setup), flush=True)
                if time.monotonic() - started > seconds:
                    break
            if list(record["arms"]) == list(arms):
                record["status"] = _status(record)
    finally:
        record["comparison"] = _compare_arms(record)
        record["seconds"] = time.monotonic() - started
        write_json(out, record)
    return record


def _describe(arm: Arm, found: dict[str, Any], setup: Setup) -> str:
    """One line on an arm."""
    if "refused" in found:
        return f"{arm}: refused: {found['refused']}"
    losses, took = found["losses"], found["seconds"]
    speed = len(losses) * setup.row_length / took["train"]
    return (
        f"{arm}: {len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"{took['prepare']:.0f} + {took['train']:.0f} s, {speed:,.0f} tokens/s, on {found['operations']}"
    )


def to_arms(text: str) -> tuple[Arm, ...]:
    """Return the arms of a list with commas. Raises `ConfigError` for an unknown or a repeated one."""
    arms = []
    for name in text.split(","):
        if name not in ARMS:
            raise ConfigError(f"--arms: {name!r} is no arm; {nearest(name, ARMS)}.")
        if name in arms:
            raise ConfigError(f"--arms: {name!r} twice; 'repeat' is fast a second time.")
        arms.append(name)
    return tuple(arms)


def print_comparison(found: dict[str, Any] | None) -> None:
    """Print every pair and every verdict."""
    if found is None:
        print("no two runs to compare")
        return
    for pair, gaps in found["pairs"].items():
        print(
            f"{pair}: mean {gaps['mean']:.2e}, largest {gaps['largest']:.2e}, last quarter {gaps['last_quarter']:+.2e} "
            f"(in size {gaps['last_quarter_mean']:.2e}), {gaps['num_steps']} steps"
        )
    for name, verdict in found["verdicts"].items():
        print(f"{name}: {verdict['holds']}")


def main() -> int:
    """Write token ids, run arms and write the record, or merge records. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="text to token ids, with the bundled tokenizer")
    tokens.add_argument("out", type=Path)
    tokens.add_argument("texts", type=Path, nargs="+")
    tokens.add_argument("--limit", type=int, default=Setup.num_steps * Setup.row_length)
    curve = commands.add_parser("run", help="train the arms")
    curve.add_argument("tokens", type=Path)
    curve.add_argument("--out", type=Path, required=True)
    curve.add_argument("--arms", default=",".join(DEFAULT_ARMS), help=f"of {', '.join(ARMS)}, in the order to run them")
    curve.add_argument("--model", default=Setup.model)
    curve.add_argument("--device", choices=("cuda", "cpu"), default=Setup.device)
    curve.add_argument("--steps", type=int, default=Setup.num_steps)
    curve.add_argument("--row-length", type=int, default=Setup.row_length)
    curve.add_argument("--memory", choices=("fast", "balanced", "small"), default=Setup.memory)
    curve.add_argument("--seconds", type=float, default=float("inf"), help="stop training after so many")
    merged = commands.add_parser("merge", help="records of different arms to one record")
    merged.add_argument("records", type=Path, nargs="+")
    merged.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.command == "tokens":
            num = write_tokens(arguments.texts, arguments.out, arguments.limit)
            print(f"{arguments.out}: {num:,} ids")
        elif arguments.command == "merge":
            print_comparison(merge(arguments.records, arguments.out)["comparison"])
        else:
            setup = Setup(
                model=arguments.model if arguments.model == TOKENIZER else os.path.relpath(arguments.model),
                device=arguments.device,
                num_steps=arguments.steps,
                row_length=arguments.row_length,
                memory=arguments.memory,
            )
            arms = to_arms(arguments.arms)
            print_comparison(run(setup, arguments.tokens, arguments.out, arguments.seconds, arms)["comparison"])
    except SsmtuneError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
