"""Evaluate through lm-evaluation-harness: its catalogue (MMLU, ARC, HellaSwag, ...) on the model that `evaluate` merges."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydantic

from ssmtune.config import STRICT
from ssmtune.errors import ConfigError, DataError, MissingDependency, nearest
from ssmtune.evaluate import NUM_SAMPLES, EvaluateConfig, evaluation_model, trained_facts
from ssmtune.models import load_tokenizer
from ssmtune.records import new_record

PREFERRED = ("acc_norm", "acc", "exact_match", "f1")
"""The metric that comparisons are made on: the first of these that a task has, else its first."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class HarnessConfig:
    """What to evaluate: names of the harness's tasks or groups; `task_directory` holds task files of your own.

    A task file of the harness may name Python functions beside it, which are then run: take files from people you trust.
    """

    model: str
    tasks: tuple[str, ...]
    adapter: str | None = None
    limit: int | None = pydantic.Field(default=None, ge=1)
    shots: int | None = pydantic.Field(default=None, ge=0)
    batch_examples: int = pydantic.Field(default=16, ge=1)
    task_directory: str | None = None
    chat_template: bool = False
    name: str = ""
    seed: int = 0


def evaluate_harness(config: HarnessConfig) -> list[dict[str, Any]]:
    """Return one evaluate record per name in `tasks`, with the harness's metrics, versions and one score per example.

    The model is the one that `evaluate` answers from: fp32, the adapter merged in fp32. The harness fetches the sets of
    the tasks that are named. Raises `MissingDependency` without lm_eval, `ConfigError` for an unknown task, `DataError`
    for a set that cannot be fetched.
    """
    simple_evaluate, model_class, manager_class = _harness()
    started = time.time()
    manager = _find_tasks(config, manager_class)
    merged = EvaluateConfig(model=config.model, task="", adapter=config.adapter)
    model = model_class(
        pretrained=evaluation_model(merged), tokenizer=load_tokenizer(config.model), batch_size=config.batch_examples
    )
    try:
        found = simple_evaluate(
            model=model,
            tasks=list(config.tasks),
            num_fewshot=config.shots,
            limit=config.limit,
            task_manager=manager,
            log_samples=True,
            apply_chat_template=config.chat_template,
            bootstrap_iters=0,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    except (OSError, RuntimeError, ConnectionError) as error:
        raise DataError(
            f"--harness {','.join(config.tasks)}: lm_eval cannot run it ({str(error).splitlines()[0]}). It fetches the sets "
            "of the tasks that are named: check the network, or give task files on local data with --harness-tasks."
        ) from None
    seconds = time.time() - started
    return [_record(config, name, found, seconds / len(config.tasks)) for name in config.tasks]


def _record(config: HarnessConfig, name: str, found: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The record of one name: a group's tasks are put one after the other, every example counted once."""
    leaves = _leaves(name, found)
    scores, ids, samples = _scores(leaves, found)
    metrics = list(scores)
    if not metrics:
        raise DataError(f"--harness {name!r}: lm_eval gave no score per example for it. Evaluate its parts by name.")
    # Metrics with a filter are written as "exact_match,strict-match".
    ranked = [m for p in PREFERRED for m in metrics if m.partition(",")[0] == p]
    return new_record(
        "evaluate",
        config=asdict(config),
        name=config.name or (config.adapter or "base"),
        seed=config.seed,
        trained=trained_facts(config.model, config.adapter),
        engine={"name": "lm_eval", "version": importlib.metadata.version("lm_eval")},
        task=f"harness:{name}",
        task_version={leaf: found["versions"].get(leaf) for leaf in leaves},
        primary=(ranked or metrics)[0],
        shots={leaf: found["n-shot"].get(leaf) for leaf in leaves},
        metrics={metric: sum(values) / len(values) for metric, values in scores.items()},
        example_ids=ids,
        scores={metric: [round(value, 6) for value in values] for metric, values in scores.items()},
        samples=samples,
        stopped_rate=None,
        harness={key: found["results"][key] for key in dict.fromkeys([name, *leaves]) if key in found["results"]},
        seconds=seconds,
    )


def _leaves(name: str, found: Mapping[str, Any]) -> list[str]:
    """The tasks with examples below a name, depth first."""
    below = found.get("group_subtasks", {}).get(name, [])
    return [leaf for part in below for leaf in _leaves(part, found)] if below else [name]


def _scores(
    leaves: Sequence[str], found: Mapping[str, Any]
) -> tuple[dict[str, list[float]], list[str], list[dict[str, Any]]]:
    """Return {metric: value per example}, ids and some samples; metrics that not every example has are left out."""
    table: dict[str, dict[str, float]] = {}
    samples: list[dict[str, Any]] = []
    for leaf in leaves:
        for sample in found["samples"].get(leaf, []):
            id_ = f"{leaf}/{sample['doc_id']}"
            row = table.setdefault(id_, {})
            kept = {
                _metric(metric, sample.get("filter", "none")): float(sample[metric])
                for metric in sample.get("metrics", [])
                if isinstance(sample.get(metric), (int, float))
            }
            row.update(kept)
            if len(samples) < NUM_SAMPLES:
                samples.append(
                    {
                        "id": id_,
                        "prompt": str(_first(sample["arguments"])),
                        "expected": str(sample["target"]),
                        "completion": str(sample["filtered_resps"]),
                        "scores": kept,
                    }
                )
    rows = list(table.values())
    names = [metric for metric in rows[0] if all(metric in row for row in rows)] if rows else []
    return {metric: [row[metric] for row in rows] for metric in names}, list(table), samples


def _metric(name: str, filtered: str) -> str:
    return name if filtered == "none" else f"{name},{filtered}"


def _first(arguments: Any) -> Any:
    """The text that the harness showed the model first."""
    while isinstance(arguments, (list, tuple, Mapping)) and arguments:
        arguments = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return arguments


def _harness() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise MissingDependency("--harness needs lm-evaluation-harness: pip install 'ssmtune[eval]'") from None
    return simple_evaluate, HFLM, TaskManager


def _find_tasks(config: HarnessConfig, manager_class: Any) -> Any:
    """The harness's index of tasks: that of the given directory where it has all of them, for the whole takes seconds."""
    own = config.task_directory
    if own is not None and not Path(own).is_dir():
        raise ConfigError(f"--harness-tasks {own}: is no directory. Give the one that holds your task files.")
    manager = manager_class(include_path=own, include_defaults=False) if own is not None else None
    if manager is None or not set(config.tasks) <= set(manager.all_tasks):
        manager = manager_class(include_path=own)
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"--harness {name!r}: lm_eval has no such task; {nearest(name, manager.all_tasks)}.")
    return manager
