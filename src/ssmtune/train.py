"""Train: a model, a recipe and data become a run directory. The `train` stage, on TRL's SFTTrainer.

RUN/run.json            the record: config, plan, history, movement of the core, verify result
RUN/adapter/            the trained adapter (the best checkpoint, both halves of one step)
RUN/checkpoints/        resumable states, each vouched for by a complete.json that is written last
RUN/warmup/             only where the recipe asks for a warm-up: its selection and checkpoints (`warmup`)
RUN/logs/               TensorBoard
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.errors import ConfigError
from ssmtune.full_disk import full_disk_is_named
from ssmtune.memory import Memory, keep_activations
from ssmtune.methods.lora import LoraOptions
from ssmtune.models import Dtype, load_tokenizer, weightless
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.quantize import load_base, quantization_facts
from ssmtune.quantized import QuantizeConfig
from ssmtune.recipe import Recipe
from ssmtune.records import digest, new_record, read_record, write_json
from ssmtune.training_data import DataConfig, TrainingData, prepare_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.attach import AdaptedModel
    from ssmtune.sft import EditTrainer

RECORD = "run.json"


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW with a cosine schedule; projections, the core, and states or gates each form a group.

    `clip="separate"` clips each group by its own norm; "joint" clips all by their common norm, where the core's
    gradients, which are much larger at first, scale the others down.
    """

    learning_rate: float = pydantic.Field(default=2e-4, gt=0)
    core_learning_rate: float = pydantic.Field(default=1e-3, gt=0)
    state_learning_rate: float = pydantic.Field(default=1e-3, gt=0)
    weight_decay: float = pydantic.Field(default=0.01, ge=0)
    warmup_share: float = pydantic.Field(default=0.06, ge=0, lt=1)
    clip: Literal["separate", "joint"] = "separate"
    clip_norm: float = pydantic.Field(default=1.0, gt=0)


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """What a run.yaml holds.

    `data_order` seeds the order of the rows and `placement_seed` a random placement; None is `seed`.
    """

    model: str
    output_dir: str
    data: DataConfig
    recipe: str | Recipe = "all+core"
    name: str = ""
    lora: LoraOptions = field(default_factory=lambda: LoraOptions(dropout=0.05))
    allow_unmatched: bool = False
    budget: int | None = pydantic.Field(default=None, ge=1)
    without: tuple[str, ...] = ()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    data_order: int | None = None
    placement_seed: int | None = None
    num_epochs: float = pydantic.Field(default=3.0, gt=0)
    max_steps: int | None = pydantic.Field(default=None, ge=1)
    rows_per_step: int = pydantic.Field(default=8, ge=1)
    num_accumulated: int = pydantic.Field(default=1, ge=1)
    num_evaluations: int = pydantic.Field(default=5, ge=1)
    dtype: Dtype = "auto"
    memory: Memory = "fast"
    quantize: QuantizeConfig | None = None


def train(config: TrainConfig, *, on_message: Callable[[str], None] = print, progress: bool = True) -> dict[str, Any]:
    """Train as `config` says, write the run directory and return its record.

    A run that was interrupted is continued from its last complete checkpoint; a finished one is returned as it is.
    Raises `ConfigError` when the directory holds a run with another config, `TrainingFailed` for a non-finite loss or
    a full disk; the record then says so and earlier checkpoints stay.
    """
    # Imported here, as everything that loads torch is, so that reading a config stays quick.
    from ssmtune.core_report import describe_core, describe_gates, describe_ranks

    run_dir = Path(config.output_dir)
    settings = to_settings(config)
    earlier = _earlier_run(run_dir, settings)
    if earlier is not None:
        on_message(f"{run_dir}: this run is done already; nothing to do.")
        return earlier
    started = time.time()
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer)
    for message in data.messages:
        on_message(message)
    adapted = _adapted_model(config)
    record = new_record(
        "train",
        config=settings,
        status="aborted",
        run_id=f"{digest(settings)}-{config.seed}",
        name=config.name or recipe_name(config),
        plan=plan_summary(adapted),
        data=data.summary,
        quantization=quantization_facts(adapted.base_model.model),
        base_dtype=str(adapted.base_model.model.dtype).removeprefix("torch."),
        history=[],
        eval_history=[],
        verify=None,
    )
    write_json(run_dir / RECORD, record)
    try:
        with full_disk_is_named(run_dir):
            adapted, stages = _warmed_up(config, adapted, data, record, progress, on_message)
            trainer = _make_trainer(config, adapted, data, record, progress)
            _run(trainer, on_message)
            trainer.graphs.release()
            trainer.restore_best()
            adapted.save_pretrained(run_dir / "adapter", step=trainer.restored_step, run_id=record["run_id"])
            finished = record | {
                "status": "provisional" if record["environment"]["dirty"] else "done",
                "history": trainer.history,
                "eval_history": trainer.eval_history,
                "restored_step": trainer.restored_step,
                "stages": [*stages, {"name": "training", "num_steps": trainer.args.max_steps}],
                "core": describe_core(adapted),
                "gates": describe_gates(adapted),
                "ranks": describe_ranks(adapted),
                "core_held": trainer.guard.num_held,
                "operations": f"{adapted.fast_block}; {trainer.graphs.describe()}",
                "survival": survival(adapted),
                "seconds": time.time() - started,
                "peak_memory_bytes": peak_memory(),
            }
            write_json(run_dir / RECORD, finished)
    except BaseException as error:
        record["status"] = "failed" if isinstance(error, Exception) else "aborted"
        record["error"] = str(error)
        _write_last_record(run_dir, record)
        raise
    return finished


def to_settings(config: TrainConfig) -> dict[str, Any]:
    """The config as it comes back from JSON, without where it is written to: what decides the outcome."""
    import json

    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    del settings["output_dir"]
    if settings["quantize"] is None:
        # Runs from before there was such a block continue.
        del settings["quantize"]
    return settings


def recipe_name(config: TrainConfig) -> str:
    """The recipe's name, whether it was given by name or in full."""
    return config.recipe if isinstance(config.recipe, str) else config.recipe.name


def _earlier_run(run_dir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    if not (run_dir / RECORD).exists():
        return None
    record = read_record(run_dir / RECORD, kind="train")
    if digest(record["config"]) != digest(settings):
        changed = sorted(k for k in settings if settings[k] != record["config"].get(k))
        raise ConfigError(
            f"{run_dir}: holds a run with another config (differs in {', '.join(changed)}). "
            "Choose another output_dir, or delete that one."
        )
    return record if record["status"] in ("done", "provisional") else None


def _adapted_model(config: TrainConfig) -> AdaptedModel:
    import torch

    device = "cuda" if config.quantize is not None and torch.cuda.is_available() else None
    model = load_base(config.model, dtype=training_dtype(config.dtype), device=device, quantize_config=config.quantize)
    return _attach_seeded(model, make_config_plan(config, model), config.seed)


def _attach_seeded(model: PreTrainedModel, plan: Plan, seed: int) -> AdaptedModel:
    """Attach the plan with the adapters that the seed starts from."""
    from transformers import set_seed

    from ssmtune.attach import attach

    set_seed(seed)
    return attach(model, plan)


def _warmed_up(
    config: TrainConfig,
    adapted: AdaptedModel,
    data: TrainingData,
    record: dict[str, Any],
    progress: bool,
    on_message: Callable[[str], None],
) -> tuple[AdaptedModel, list[dict[str, Any]]]:
    """The adapted model with every choice made that its plan leaves to a warm-up, and the stages that took."""
    from ssmtune.warmup import choose_by_warm_up

    directory = Path(config.output_dir) / "warmup"
    return choose_by_warm_up(
        adapted,
        directory,
        attach_again=lambda base: _attach_seeded(base, adapted.plan, config.seed),
        make_trainer=lambda warming, num_steps: _make_trainer(
            config, warming, data, record, progress, num_warmup_steps=num_steps, directory=directory
        ),
        run=lambda trainer: _run(trainer, on_message),
    )


def training_dtype(dtype: Dtype) -> Dtype:
    """Return the precision to load the base in: "auto" is fp32 on a CPU, where bf16 is slow, and the checkpoint's on a GPU."""
    import torch

    return "float32" if dtype == "auto" and not torch.cuda.is_available() else dtype


def make_config_plan(config: TrainConfig, model: Any) -> Plan:
    """The plan of a training config for its model."""
    recipe = config.recipe
    if isinstance(recipe, str):
        recipe = named_recipe(recipe, **asdict(config.lora), seed=config.seed, allow_unmatched=config.allow_unmatched)
    if config.placement_seed is not None:
        recipe = replace(recipe, edits=tuple(replace(edit, seed=config.placement_seed) for edit in recipe.edits))
    recipe = replace(recipe, without=(*recipe.without, *config.without))
    return make_plan(model, recipe, budget=config.budget)


def _make_trainer(
    config: TrainConfig,
    adapted: AdaptedModel,
    data: TrainingData,
    record: dict[str, Any],
    progress: bool,
    *,
    num_warmup_steps: int = 0,
    directory: Path | None = None,
) -> EditTrainer:
    """The trainer of a run, or, with a number of steps, of its warm-up below `directory`."""
    # TRL and transformers are imported here so that reading a config does not load them.
    from ssmtune.sft import EditTrainer, make_sft_config

    keep_activations(adapted, config.memory)
    num_steps = num_warmup_steps or num_training_steps(config, len(data.train))
    return EditTrainer(
        adapted,
        make_sft_config(
            config,
            num_steps,
            adapted.base_model.model.dtype,
            directory=directory or Path(config.output_dir),
            warming_up=num_warmup_steps > 0,
        ),
        data,
        optimizer_config=config.optimizer,
        run_id=record["run_id"],
        progress=progress,
    )


def num_training_steps(config: TrainConfig, num_rows: int) -> int:
    """Return how many optimiser steps a run of `config` takes on so many rows."""
    steps_per_epoch = -(-num_rows // (config.rows_per_step * config.num_accumulated))
    return config.max_steps or max(1, round(steps_per_epoch * config.num_epochs))


def _run(trainer: EditTrainer, on_message: Callable[[str], None]) -> None:
    checkpoint, removed = trainer.find_checkpoint()
    for path in removed:
        on_message(f"{path}: incomplete checkpoint (saving was interrupted), removed.")
    if checkpoint is not None:
        on_message(f"Continuing from {checkpoint}.")
        if trainer.is_last(checkpoint):
            return
    with warnings.catch_warnings():
        # The order of data is replayed on resume; torch warns about state it cannot see.
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _write_last_record(run_dir: Path, record: dict[str, Any]) -> None:
    try:
        write_json(run_dir / RECORD, record)
    except OSError:
        # The disk is what failed; the error that is on its way says so, and an aborted record is already there.
        pass


def plan_summary(adapted: AdaptedModel) -> dict[str, Any]:
    """What a record keeps of a plan: counts, groups, coverage by layer."""
    from ssmtune.inventory import coverage_table, take_inventory

    plan = adapted.plan
    # The inventory of the base: the adapted model's own names carry PEFT's layers.
    inventory = take_inventory(weightless(adapted.base_model.model.config))
    return {
        "digest": plan.digest,
        "recipe": plan.recipe,
        "total": plan.total,
        "trainable": plan.trainable,
        "groups": plan.groups,
        "coverage": coverage_table(inventory, {site.path for site in plan.sites}),
    }


def survival(adapted: AdaptedModel) -> list[dict[str, Any]]:
    """Share of each role's change that survives rounding to bf16, for roles whose tensors fit the check."""
    from ssmtune.merge import survival_report
    from ssmtune.rounding import survival_by_role

    return survival_by_role(survival_report(adapted))


def peak_memory() -> int:
    """Largest memory used so far, bytes: allocated on the GPU where there is one, else resident in this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
