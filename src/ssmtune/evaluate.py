"""Evaluate: a model, with or without an adapter, answers a task's held-out questions. The `evaluate` stage."""

from __future__ import annotations

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
from ssmtune.tasks.base import Example, Task, get_task, messages, split
from ssmtune.training_data import task_examples

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ssmtune.attach import AdaptedModel

Engine = Literal["transformers", "llamacpp"]

NUM_SAMPLES = 12
"""Completions kept in the record, for reading."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """What to evaluate, and on how much of the task's test side."""

    model: str
    task: str
    size: float = pydantic.Field(default=1.0, gt=0, le=1)
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


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> dict[str, Any]:
    """Return the evaluate record: metrics, one score per example and metric, samples, share of answers that stopped.

    Answers are greedy. The weights are the base's in fp32 with the adapter merged in fp32, so that nothing is rounded;
    `without_core` leaves the adapter's core out. The engine llamacpp answers from those weights as a GGUF file; raises
    `AttachError` for an adapter that no weight can hold, `MissingDependency` where llama.cpp is not installed.
    """
    started = time.time()
    task = get_task(config.task)
    tokenizer = load_tokenizer(config.model)
    examples = split(task_examples(config.task, config.size)).test[: config.num_examples]
    prompts = [messages(example)[0] for example in examples]
    if config.engine == "llamacpp":
        answers, engine = _answer_llamacpp(config, tokenizer, prompts, task.max_new_tokens, progress)
    else:
        engine = {"name": "transformers"}
        answers = answer(
            evaluation_model(config),
            tokenizer,
            prompts,
            max_new_tokens=task.max_new_tokens,
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
        metrics={metric: sum(s[metric] for s in scores) / len(scores) for metric in task.metrics},
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


def _samples(
    task: Task, examples: Sequence[Example], completions: Sequence[str], scores: Sequence[dict[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            "id": example.id,
            "prompt": messages(example)[0][0]["content"],
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
    batch_examples: int = 64,
    progress: bool = True,
) -> list[tuple[str, bool]]:
    """Return (text, stopped) for each prompt (chat messages), greedily; `stopped` says that the model ended its turn.

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
                batch, _generate(model, tokenizer, [tokens[i] for i in batch], max_new_tokens), strict=True
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[list[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    import torch

    width = max(map(len, batch))
    pad: Any = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    generate: Callable[..., torch.Tensor] = model.generate
    output = generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    results = []
    for row in output[:, width:].tolist():
        stopped = tokenizer.eos_token_id in row
        end = row.index(tokenizer.eos_token_id) if stopped else len(row)
        results.append((tokenizer.decode(row[:end], skip_special_tokens=False), stopped))
    return results
