"""Evaluate: a model, with or without an adapter, answers a task's held-out questions. The `evaluate` stage."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssmtune.config import STRICT, read_json
from ssmtune.errors import ConfigError
from ssmtune.evaluate_llamacpp import NUM_SLOTS, answer_through_llamacpp, engine_facts, require_llamacpp, write_gguf
from ssmtune.export.base import GgufType
from ssmtune.merged_files import PROVENANCE
from ssmtune.models import load_model, load_tokenizer, model_location
from ssmtune.records import new_record
from ssmtune.tasks._outcomes import by_variation, commonest, means
from ssmtune.tasks._sandbox import MAX_BYTES, MAX_SECONDS, run_python
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import STOPS, Example, Task, get_task, messages, stop_text, with_shots
from ssmtune.training_data import task_side, task_sources

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssmtune.attach import AdaptedModel

Engine = Literal["transformers", "llamacpp"]

NUM_SAMPLES = 12
"""Completions kept in the record, for reading."""

SHOTS_SEED = 42


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """What to evaluate, and on how much of the task's test side.

    `directory` is where the sets of tasks lie, as in `DataConfig`. `shots` solved examples of the training side stand before
    every question, the same ones. `allow_execution`: run the programs that the model writes, for a task scored so.
    """

    model: str
    task: str
    size: float = pydantic.Field(default=1.0, gt=0, le=1)
    directory: str | None = None
    shots: int = pydantic.Field(default=0, ge=0)
    allow_execution: bool = False
    adapter: str | None = None
    without_core: bool = False
    num_examples: int | None = pydantic.Field(default=None, ge=1)
    batch_examples: int = pydantic.Field(default=64, ge=1)
    name: str = ""
    seed: int = 0
    engine: Engine = "transformers"
    gguf_type: GgufType | None = None
    """Of the file that the engine llamacpp reads; None for f16."""
    gguf: str | None = None
    """A GGUF file to answer from; None to make one of the model, for this evaluation alone."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for options that contradict each other."""
        if self.engine != "llamacpp" and (self.gguf or self.gguf_type):
            raise ConfigError(f"--{'gguf' if self.gguf else 'type'} is read by --engine llamacpp alone.")
        if self.gguf and self.gguf_type:
            raise ConfigError(f"--type {self.gguf_type}: {self.gguf} has its type already. Leave out one of the two.")
        if self.gguf and self.without_core:
            raise ConfigError(f"{self.gguf}: the core is part of its weights and cannot be left out.")


def evaluate(config: EvaluateConfig, *, model: PreTrainedModel | None = None, progress: bool = True) -> dict[str, Any]:
    """Return the evaluate record: metrics, one score per example and metric, samples, share of answers that stopped.

    `corpus_metrics` are of all answers together (Matthews, F1, BLEU), `variations` the metrics by variation, `commonest`
    what always giving the commonest answer of these examples would score.

    Answers are greedy. The weights are the base's in fp32 with the adapter merged in fp32, so that nothing is rounded;
    One trained on a base in 4 bits is merged into the original weights (`QuantizationNote`). `without_core` leaves the core
    out. `model` is what `evaluation_model` returns for this config. The engine llamacpp answers from a GGUF file. Raises
    `AttachError` there for an adapter that no weight can hold, `MissingDependency` without llama.cpp, `DataError` for a
    set that is not there, `ConfigError` for a task that runs programs without `allow_execution`.
    """
    started = time.time()
    task = get_task(config.task)
    if isinstance(task, SourcedTask) and task.executes and not config.allow_execution:
        raise ConfigError(
            f"task {task.name!r}: is scored by running what the model writes. It runs in a sandbox that has no network and "
            "writes nowhere, which stops accidents and no attacker. Allow it with --allow-execution."
        )
    tokenizer = load_tokenizer(config.model)
    examples = task_side(config.task, "test", config.size, config.directory)[: config.num_examples]
    shots = pick_shots(config) if config.shots else []
    prompts = [with_shots(messages(example)[0], shots) for example in examples]
    if config.engine == "llamacpp":
        answers, engine = _answer_llamacpp(config, tokenizer, prompts, task.max_new_tokens, progress)
    else:
        engine = {"name": "transformers"}
        answers = answer(
            evaluation_model(config) if model is None else model,
            tokenizer,
            prompts,
            max_new_tokens=task.max_new_tokens,
            stops=task.stops,
            batch_examples=config.batch_examples,
            progress=progress,
        )
    completions = [text for text, _ in answers]
    scores = [task.score(text, example) for text, example in zip(completions, examples, strict=True)]
    return new_record(
        "evaluate",
        config=asdict(config),
        name=config.name or (config.adapter or "base"),
        seed=config.seed,
        engine=engine,
        trained=trained_facts(config.model, config.adapter),
        task=task.name,
        task_version=task.version,
        primary=task.primary,
        chance=task.chance,
        commonest=commonest(task, examples),
        sources=task_sources(config.task, "test", config.directory),
        shots=[shot.id for shot in shots],
        **_sandbox_facts(task),
        metrics=means(task, scores),
        corpus_metrics=task.score_corpus(completions, examples) if isinstance(task, SourcedTask) else {},
        variations=by_variation(task, examples, scores),
        example_ids=[example.id for example in examples],
        scores={metric: [round(s[metric], 6) for s in scores] for metric in task.metrics},
        samples=_samples(task, examples, completions, scores),
        stopped_rate=sum(stopped for _, stopped in answers) / len(answers),
        seconds=time.time() - started,
    )


def trained_facts(model: str, adapter: str | None) -> dict[str, Any] | None:
    """Return which run trained what a record is of (run, recipe, trained and total parameters), None for a base.

    It is read from the adapter, or from the model's directory where a run was merged into it.
    """
    from ssmtune.adapter_files import OUR_CONFIG

    path = Path(model_location(model)) / PROVENANCE if adapter is None else Path(adapter) / OUR_CONFIG
    facts = read_json(path) if path.is_file() else {}
    if adapter is not None and isinstance(plan := facts.get("plan"), dict):
        facts = {**plan, "run_id": facts.get("run_id")}
    known = {name: facts.get(name) for name in ("run_id", "recipe", "trainable", "total")}
    return known if known["trainable"] and known["total"] else None


def _sandbox_facts(task: Task) -> dict[str, Any]:
    """What a record says of a sandbox that ran programs: whether the kernel's namespaces were around it."""
    if not isinstance(task, SourcedTask) or not task.executes:
        return {}
    return {"sandbox": {"isolated": run_python("pass").isolated, "max_seconds": MAX_SECONDS, "max_bytes": MAX_BYTES}}


def pick_shots(config: EvaluateConfig) -> list[Example]:
    """Return the solved examples to show: short ones of the training side, the same for a task whatever is evaluated.

    Drawn with a fixed seed from the half of the first thousand examples that is shorter, so that they leave room.
    Raises `DataError` when the task has no training side, `ConfigError` when it has too few examples.
    """
    known = task_side(config.task, "train", config.size, config.directory)[:1000]
    short = sorted(known, key=lambda example: len(example.input) + len(example.output))[: -(-len(known) // 2)]
    if len(short) < config.shots:
        raise ConfigError(
            f"--shots {config.shots}: task {config.task!r} has {len(short)} examples to choose from. Ask for fewer."
        )
    return random.Random(f"shots:{SHOTS_SEED}").sample(short, config.shots)


def _samples(
    task: Task, examples: Sequence[Example], completions: Sequence[str], scores: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            "id": example.id,
            "prompt": messages(example)[0][-1]["content"],
            "expected": example.output,
            "completion": completion,
            "scores": score,
        }
        for example, completion, score in list(zip(examples, completions, scores, strict=True))[:NUM_SAMPLES]
    ]


def evaluation_model(config: EvaluateConfig) -> PreTrainedModel:
    """Return the fp32 model to evaluate, on the GPU where there is one, on ssmtune's operations.

    An adapter is merged; one that no weight can hold (states, branches, learned positions) stays attached.
    """
    import torch

    from ssmtune.families.base import find_family
    from ssmtune.merge import merge
    from ssmtune.operations import install_operations

    model, adapted = _load(config, "cuda" if torch.cuda.is_available() else "cpu")
    if adapted is not None and adapted.plan.unmergeable:
        attached: PreTrainedModel = adapted.eval()
        return attached
    if adapted is not None:
        model = merge(adapted)
    install_operations(model, find_family(model.config.model_type)[1])
    return model.eval()


def _load(config: EvaluateConfig, device: str) -> tuple[PreTrainedModel, AdaptedModel | None]:
    """The base in fp32, and the same model with the adapter on it where there is one."""
    from ssmtune.attach import load

    model = load_model(config.model, dtype="float32", device=device)
    if config.adapter is None:
        return model, None
    adapted = load(model, Path(config.adapter))
    if config.without_core:
        for edit in adapted.edits.values():
            edit.enabled = False
    return model, adapted


def _merged_model(config: EvaluateConfig, device: str) -> PreTrainedModel:
    from ssmtune.merge import merge

    model, adapted = _load(config, device)
    return model if adapted is None else merge(adapted)


def _answer_llamacpp(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    progress: bool,
) -> tuple[list[tuple[str, bool]], dict[str, Any]]:
    """Return the answers and what the record says of the engine."""
    import torch

    require_llamacpp()
    with tempfile.TemporaryDirectory(prefix="ssmtune-evaluate-") as scratch:
        if config.gguf is not None:
            gguf = Path(config.gguf)
        else:
            out = Path(scratch) / "model.gguf"
            gguf = write_gguf(_merged_model(config, "cpu"), tokenizer, out, config.gguf_type or "f16")
        facts = engine_facts(gguf)
        bar = _progress_bar(progress)
        with bar:
            steps = bar.add_task("evaluate", total=len(prompts))
            answers = answer_through_llamacpp(
                gguf,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                num_slots=min(NUM_SLOTS, config.batch_examples),
                num_threads=torch.get_num_threads(),
                on_answer=lambda: bar.advance(steps),
            )
    return answers, facts


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    *,
    max_new_tokens: int,
    stops: Sequence[str] = STOPS,
    batch_examples: int = 64,
    progress: bool = True,
) -> list[tuple[str, bool]]:
    """Return (text, stopped) for each prompt (chat messages), greedily; `stopped` says that the model ended its turn.

    An answer also ends at the first of `stops` that is written as plain text (`STOPS` are tokens), which is left out.
    Prompts of similar length share a batch, padded on the left.
    """
    import torch

    rendered = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    tokens = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    answers: list[tuple[str, bool]] = [("", False)] * len(tokens)
    bar = _progress_bar(progress)
    with bar, torch.inference_mode():
        steps = bar.add_task("evaluate", total=len(tokens))
        for first in range(0, len(order), batch_examples):
            batch = order[first : first + batch_examples]
            for index, result in zip(
                batch, _generate(model, tokenizer, [tokens[i] for i in batch], max_new_tokens, stops), strict=True
            ):
                answers[index] = result
            bar.advance(steps, len(batch))
    return answers


def _progress_bar(progress: bool) -> Progress:
    return Progress(
        TextColumn("evaluate"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    max_new_tokens: int,
    stops: Sequence[str],
) -> list[tuple[str, bool]]:
    import torch

    width = max(map(len, batch))
    pad: Any = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    written = [stop for stop in stops if stop not in STOPS]
    # Only where there are some: looking for text costs a decoding at each step.
    early = {"stop_strings": written, "tokenizer": tokenizer} if written else {}
    generate: Callable[..., torch.Tensor] = model.generate
    output = generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **early,
    )
    results = []
    for row in output[:, width:].tolist():
        stopped = tokenizer.eos_token_id in row
        end = row.index(tokenizer.eos_token_id) if stopped else len(row)
        text = str(tokenizer.decode(row[:end], skip_special_tokens=False))
        kept = stop_text(text, written)
        results.append((kept, stopped or kept != text))
    return results
