"""Pretrain the matched sisters: five models of one size on the same tokens in the same order, for controlled studies.

    python recipes/pretrain.py pack --corpus DIR --instructions FILE... --out DIR
    python recipes/pretrain_matched.py --sister NAME --data DIR --out DIR [--steps N] [--agree DIR --max-seconds S]

The number of steps is fixed, so that every sister sees the same tokens.
With `--agree`, sisters that start together first measure their speed together, and all take the number of steps that
the slowest of them can take in `--max-seconds`, at most `--steps`; up to there the schedule does not depend on it.
Packing, windows, schedule, optimiser and evaluation are those of `pretrain.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from matched_forward import MatchedForward
from pretrain import (
    EVALUATION_SHARES,
    LOG_INTERVAL_S,
    MANIFEST,
    PARITY_WINDOWS,
    TOKENIZER_FILES,
    TOKENIZER_PATH,
    PretrainConfig,
    WindowStream,
    _read_manifest,
    autocast,
    build_optimizer,
    choose_forward,
    compare_forwards,
    held_out_facts,
    held_out_nats,
    held_out_rows,
    initialise_mixer,
    learning_rate_factor,
    read_tokens,
    sample_continuations,
    shorten_curve,
    start_reading,
)
from train_tokenizer import END_OF_TEXT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ssmtune.errors import ConfigError, DataError, TrainingFailed, nearest
from ssmtune.models import load_model
from ssmtune.parallel_gated_delta_model import register_parallel_gated_delta
from ssmtune.records import file_sha256, new_record, write_json

SISTERS_PATH = Path(__file__).resolve().parent / "matched_sisters.yaml"
SPEED_STEPS = 40
"""Steps that sisters take together before they agree; all lie in the part of the schedule that is the same for any number."""
STEP_MULTIPLE = 50
GATHER_TIMEOUT_S = 240.0
OVERTIME = 1.5
"""A run that takes so many times `--max-seconds` is stopped, and its record says so."""


def load_sisters(path: Path) -> dict[str, PretrainConfig]:
    """Return the configs in a YAML file with `training`, `shared` and `models`. Raises `ConfigError` for a wrong field."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections = {"training", "shared", "models"}
    if set(data) != sections:
        raise ConfigError(f"{path}: has the sections {sorted(data)}; needs {sorted(sections)}.")
    known = {field.name for field in dataclasses.fields(PretrainConfig)} - {"model"}
    if set(data["training"]) != known:
        wrong = sorted(set(data["training"]) ^ known)
        raise ConfigError(f"{path}: training: unknown or missing fields {wrong}; needs exactly {sorted(known)}.")
    return {
        name: PretrainConfig(model={**data["shared"], **model}, **data["training"])
        for name, model in data["models"].items()
    }


def build_sister(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a freshly initialised sister in fp32; the cores and convolutions of both recurrences start alike.

    Raises `ConfigError` when the vocabulary is smaller than the tokenizer's.
    """
    if config.model["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"model.vocab_size: got {config.model['vocab_size']}; the tokenizer has {len(tokenizer)} tokens."
        )
    register_parallel_gated_delta()
    torch.manual_seed(config.seed)
    arguments = dict(config.model)
    model_config = CONFIG_MAPPING[arguments.pop("model_type")](
        **arguments,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    for module in model.modules():
        if "A_log" in dict(module.named_parameters(recurse=False)):
            initialise_mixer(module)
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """A folder through which sisters that run at the same time tell each other one number per stage."""

    folder: Path
    name: str
    names: tuple[str, ...]
    timeout_s: float = GATHER_TIMEOUT_S

    def gather(self, stage: str, value: float) -> dict[str, float]:
        """Write `value`, wait until every sister has written hers or failed (`NAME.failed`), and return what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{self.name}.{stage}.json", {"value": value})
        waited_until = time.perf_counter() + self.timeout_s
        while True:
            paths = {name: self.folder / f"{name}.{stage}.json" for name in self.names}
            present = {name: path for name, path in paths.items() if path.exists()}
            has_failed = [name for name in self.names if (self.folder / f"{name}.failed").exists()]
            if set(present) | set(has_failed) >= set(self.names) or time.perf_counter() > waited_until:
                return {name: float(_read_manifest(path)["value"]) for name, path in present.items()}
            time.sleep(0.2)


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What training leaves behind, apart from the weights."""

    num_steps: int
    curve: list[list[float]] = dataclasses.field(default_factory=list)
    held_out_curve: list[dict[str, float]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    steps_taken: int = 0
    loop_seconds: float = 0.0
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds per step of every sister, as measured together."""


def agreed_steps(planned: int, seconds_per_step: dict[str, float], *, max_seconds: float, warmup_steps: int) -> int:
    """Return the steps that the slowest can take in `max_seconds`: a multiple of 50, at most `planned`.

    Never so few that the constant part of the schedule would end before the agreement.
    """
    affordable = int(max_seconds / max(seconds_per_step.values())) // STEP_MULTIPLE * STEP_MULTIPLE
    return min(planned, max(affordable, 2 * (warmup_steps + SPEED_STEPS)))


def fit(
    forward: MatchedForward,
    config: PretrainConfig,
    corpus: WindowStream,
    instructions: WindowStream | None,
    *,
    num_steps: int,
    max_seconds: float | None,
    agreement: Agreement | None,
    evaluate: Callable[[], float],
) -> Progress:
    """Train in place for `num_steps`, or for what is agreed. Raises `TrainingFailed` when the loss is not finite."""
    model, device = forward.model, corpus.tokens.device
    optimizer = build_optimizer(model, config, is_fused=device.type == "cuda")
    progress = Progress(num_steps=num_steps)
    evaluations = list(EVALUATION_SHARES)
    reading: Callable[[], float] | None = None
    if agreement is not None:
        agreement.gather("ready", 0.0)
    started = last_log = time.perf_counter()
    excluded_s, steps_logged = 0.0, 0
    while progress.steps_taken < progress.num_steps:
        step = progress.steps_taken
        if agreement is not None and max_seconds is not None and step == SPEED_STEPS:
            if device.type == "cuda":
                torch.cuda.synchronize()
            paused = time.perf_counter()
            progress.speeds = agreement.gather("speed", (paused - started) / SPEED_STEPS)
            progress.num_steps = agreed_steps(
                num_steps, progress.speeds, max_seconds=max_seconds, warmup_steps=config.warmup_steps
            )
            print(
                f"agreed on {progress.num_steps} steps of {num_steps}; seconds per step {progress.speeds}", flush=True
            )
            excluded_s += time.perf_counter() - paused
        elapsed = time.perf_counter() - started - excluded_s
        if max_seconds is not None and elapsed > OVERTIME * max_seconds:
            print(f"!!! STOPPED at step {step}: {elapsed:.0f} s, allowed {max_seconds:.0f} s", flush=True)
            break
        share = step / progress.num_steps
        if evaluations and share >= evaluations[0]:
            evaluations.pop(0)
            paused = time.perf_counter()
            bits = evaluate()
            progress.held_out_curve.append({"share": share, "num_tokens": progress.num_tokens, "bits_per_byte": bits})
            print(f"{share:6.1%} step {step} held-out bits per byte {bits:.4f}", flush=True)
            excluded_s += time.perf_counter() - paused
        is_final = share >= 1 - config.final_share
        instruction_share = config.final_instruction_share if is_final else config.instruction_share
        num_instruction_rows = round(config.batch_rows * instruction_share) if instructions is not None else 0
        rows = corpus.take(config.batch_rows - num_instruction_rows)
        if instructions is not None and num_instruction_rows:
            rows = torch.cat([rows, instructions.take(num_instruction_rows)])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step=step, share=share, config=config)
        with autocast(device):
            loss = forward.loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # One step stays in flight: the host prepares the next one while the device works.
        if reading is not None:
            _note_loss(progress, reading())
        reading = start_reading(loss.detach())
        progress.steps_taken += 1
        progress.num_tokens += rows[:, 1:].numel()
        now = time.perf_counter()
        if now - last_log > LOG_INTERVAL_S and progress.curve:
            speed = (progress.steps_taken - steps_logged) * rows[:, 1:].numel() / (now - last_log)
            print(f"{share:6.1%} step {step} loss {progress.curve[-1][1]:.4f} {speed / 1e6:.3f} M tokens/s", flush=True)
            last_log, steps_logged = now, progress.steps_taken
    if reading is not None:
        _note_loss(progress, reading())
    progress.loop_seconds = time.perf_counter() - started - excluded_s
    return progress


def _note_loss(progress: Progress, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"the loss of step {len(progress.curve)} is {loss}. Lower learning_rate in matched_sisters.yaml, for all sisters."
        )
    progress.curve.append([len(progress.curve), loss])


def train(
    name: str,
    config: PretrainConfig,
    *,
    data_path: Path,
    tokenizer_path: Path,
    out_path: Path,
    num_steps: int,
    max_seconds: float | None,
    agreement: Agreement | None,
    try_compile: bool,
) -> dict[str, Any]:
    """Pretrain one sister; write checkpoint (bf16), tokenizer files and `pretrain.json` to `out_path`; return the record.

    Held-out bits per byte are those of the written checkpoint in fp32, on non-overlapping windows, no carried context.
    """
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    manifest = _read_manifest(data_path / MANIFEST)
    if manifest.get("tokenizer_sha256") != file_sha256(tokenizer_path / "tokenizer.json"):
        raise DataError(
            f"{data_path}: packed with another tokenizer than {tokenizer_path}. Run 'pretrain.py pack' again."
        )
    arrays = {part: read_tokens(data_path, entry) for part, entry in manifest["arrays"].items()}
    streams = {
        part: WindowStream(arrays[part], length=config.sequence_length, seed=config.seed, device=device)
        for part in ("corpus", "instructions")
        if part in arrays
    }
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    windows = held_out_rows(arrays["valid"], length=config.sequence_length, end=end, device=device)
    to_bits = 1 / math.log(2) / manifest["valid_bytes"]
    model = build_sister(config, tokenizer).to(device).train()
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{name}: {num_params:,} parameters on {device}", flush=True)

    def held_out(subject: PreTrainedModel, *, is_autocast: bool) -> float:
        eager = MatchedForward(subject, chunk=config.ssd_chunk, is_compiled=False)
        rows = max(1, config.batch_rows // 4)
        return to_bits * sum(held_out_nats(eager, w, batch_rows=rows, is_autocast=is_autocast) for w in windows)

    probe_rows = corpus_rows(streams["corpus"], config)
    forward, compile_facts = choose_forward(
        lambda is_compiled: MatchedForward(model, chunk=config.ssd_chunk, is_compiled=is_compiled),
        probe_rows,
        try_compile=try_compile,
    )
    progress = fit(
        forward,
        config,
        streams["corpus"],
        streams.get("instructions"),
        num_steps=num_steps,
        max_seconds=max_seconds,
        agreement=agreement,
        evaluate=lambda: held_out(model, is_autocast=True),
    )
    out_path.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out_path)
    for file in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_path / file, out_path / file)
    saved = load_model(str(out_path), dtype="float32", device=str(device)).eval()
    bits = held_out(saved, is_autocast=False)
    print(f"{name}: held-out bits per byte {bits:.4f}; xz -9e {manifest['valid_xz_bits_per_byte']:.4f}", flush=True)
    eager = MatchedForward(saved, chunk=config.ssd_chunk, is_compiled=False)
    record = new_record(
        "pretrain",
        status="done" if progress.steps_taken == progress.num_steps else "aborted",
        config=dataclasses.asdict(config),
        sister=name,
        planned_steps=num_steps,
        num_steps=progress.steps_taken,
        num_params=num_params,
        num_tokens=progress.num_tokens,
        epochs={part: stream.epochs for part, stream in streams.items()},
        seconds=time.perf_counter() - started,
        tokens_per_second=progress.num_tokens / progress.loop_seconds,
        seconds_per_step_together=progress.speeds,
        compile=compile_facts,
        held_out=held_out_facts(bits, manifest, config, len(arrays["valid"]), progress.held_out_curve),
        parity_fp32=compare_forwards(eager, windows[0][:PARITY_WINDOWS]),
        loss_curve={"columns": ["step", "loss"], "points": shorten_curve(progress.curve)},
        data=manifest,
        checkpoint_sha256=file_sha256(out_path / "model.safetensors"),
    )
    print(f"{name}: fast forward against transformers' in fp32: {record['parity_fp32']}", flush=True)
    # Written before the samples too, which run transformers' slow generation.
    write_json(out_path / "pretrain.json", record)
    record["samples"] = sample_continuations(saved, tokenizer, num_tokens=config.sample_tokens, seed=config.seed)
    write_json(out_path / "pretrain.json", record)
    return record


def corpus_rows(stream: WindowStream, config: PretrainConfig) -> torch.Tensor:
    """Return the stream's first windows as one batch, without taking them: what the compiled forward is checked on."""
    length = config.sequence_length + 1
    rows = stream.tokens[: config.batch_rows * length]
    return rows[: len(rows) // length * length].view(-1, length).long()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain one of the matched sisters.")
    parser.add_argument("--sister", required=True, help="a name of the config's models")
    parser.add_argument("--config", type=Path, default=SISTERS_PATH)
    parser.add_argument("--data", type=Path, required=True, help="folder that 'pretrain.py pack' wrote")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_PATH)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--max-seconds", type=float, help="what training may take; 1.5 times that stops it")
    parser.add_argument("--agree", type=Path, help="folder through which sisters started together agree on the steps")
    parser.add_argument("--no-compile", action="store_true", help="run the training forward in eager mode")
    args = parser.parse_args(argv)
    sisters = load_sisters(args.config)
    if args.sister not in sisters:
        raise ConfigError(f"sister {args.sister!r}: not in {args.config}; {nearest(args.sister, sisters)}.")
    train(
        args.sister,
        sisters[args.sister],
        data_path=args.data,
        tokenizer_path=args.tokenizer,
        out_path=args.out,
        num_steps=args.steps,
        max_seconds=args.max_seconds,
        agreement=Agreement(folder=args.agree, name=args.sister, names=tuple(sisters)) if args.agree else None,
        try_compile=not args.no_compile,
    )


if __name__ == "__main__":
    main()
