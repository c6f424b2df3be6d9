"""TRL's SFTTrainer with what edits need: optimiser groups clipped apart, checkpoints that are whole or absent, exact resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig, SFTTrainer

from ssmtune import adapter_files
from ssmtune.core_guard import DecayGuard
from ssmtune.graphs import use_graphs
from ssmtune.head_loss import HeadLoss
from ssmtune.packing import PackedCollator, model_inputs
from ssmtune.records import file_sha256, write_json
from ssmtune.schedules import Schedules
from ssmtune.watch import ProgressBar, Watch

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.train import OptimizerConfig, TrainConfig
    from ssmtune.training_data import TrainingData

COMPLETE = "complete.json"
PREFIX = "checkpoint-"


def make_sft_config(
    config: TrainConfig, num_steps: int, dtype: torch.dtype, *, directory: Path, warming_up: bool = False
) -> SFTConfig:
    """TRL's settings for a training config of `num_steps` optimiser steps, with checkpoints below `directory`.

    Evaluated and saved at the same steps. A warm-up is not evaluated, and its learning rate does not decay.
    """
    cuda = torch.cuda.is_available()
    every = max(1, -(-num_steps // config.num_evaluations))
    optimizer = config.optimizer
    return SFTConfig(
        output_dir=str(directory / "checkpoints"),
        report_to=[],
        seed=config.seed,
        data_seed=config.seed if config.data_order is None else config.data_order,
        max_steps=num_steps,
        per_device_train_batch_size=config.rows_per_step,
        per_device_eval_batch_size=config.rows_per_step,
        gradient_accumulation_steps=config.num_accumulated,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant_with_warmup" if warming_up else "cosine",
        warmup_steps=round(optimizer.warmup_share * num_steps),
        weight_decay=optimizer.weight_decay,
        # Clipping is ours (`on_pre_optimizer_step`): the trainer knows one norm for all parameters only.
        max_grad_norm=0.0,
        bf16=cuda and dtype == torch.bfloat16,
        fp16=False,
        # `memory.keep_activations` has switched recomputation on where it is wanted; the trainer would for every layer.
        activation_checkpointing=False,
        eval_strategy="no" if warming_up else "steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        logging_strategy="steps",
        logging_steps=max(1, num_steps // 100),
        # A non-finite loss must stop the run, not be averaged away.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        # Routers are frozen: a balance loss could only bend the adapters towards them.
        router_aux_loss_coef=0.0,
        use_cpu=not cuda,
        packing=False,
    )


class EditTrainer(SFTTrainer):
    """Trains an `AdaptedModel`. After `train()` and `restore_best()`, `history` and `eval_history` tell what happened."""

    def __init__(
        self,
        adapted: AdaptedModel,
        args: SFTConfig,
        data: TrainingData,
        *,
        optimizer_config: OptimizerConfig,
        run_id: str,
        progress: bool,
    ) -> None:
        self.optimizer_config = optimizer_config
        self.run_id = run_id
        self.restored_step = 0
        self.history: list[dict[str, Any]] = []
        self.eval_history: list[dict[str, Any]] = []
        super().__init__(
            model=adapted,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=PackedCollator(pad_token_id=data.pad_token_id, multiple_of=64),
            processing_class=data.tokenizer,
        )
        self.adapted = adapted
        self.groups = grouped_parameters(adapted)
        self.head_loss = HeadLoss(adapted)
        self.graphs = use_graphs(adapted)
        self.guard = DecayGuard(adapted)
        self.schedules = Schedules(adapted)
        self.tokens_seen = 0
        # `compute_loss` divides by the tokens of the whole step, so accumulated micro-batches simply add up.
        self.loss_is_scaled_for_ga = True
        # TRL puts a forward of its own on the base, which scores prompts as well where Triton is missing; `compute_loss`
        # below takes the head's own path for the positions that have a target.
        vars(adapted.get_base_model()).pop("forward", None)
        adapted.require_gradients()
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch(self))
        self.add_callback(TensorBoardCallback(SummaryWriter(str(Path(args.output_dir or "").parent / "logs"))))
        if progress:
            self.add_callback(ProgressBar(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the cross entropy of the completions' tokens, summed and divided by their number in the whole step.

        The head runs on the positions that have a target and on no others (`head_loss`). In training each token has the
        edits' penalty beside its own, so that a step has it once however its tokens are accumulated.
        """
        targets = inputs["targets"]
        total = self.head_loss(model, model_inputs(inputs), inputs["loss_positions"], targets)
        if self.model.training:
            self.tokens_seen += inputs["num_tokens"]
            total = total + len(targets) * self.schedules.penalty()
        else:
            self.evaluated.append((float(total), len(targets)))
        loss = total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate with the loss per token over the whole set; the mean of batch means would depend on the batching."""
        self.evaluated: list[tuple[float, int]] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, num = (sum(column) for column in zip(*self.evaluated, strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = total / num
        return output

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with one group per optimiser group of the edits, apart where parts of one decay differently."""
        optimizer: torch.optim.Optimizer | None = vars(self).get("optimizer")
        if optimizer is None:
            config = self.optimizer_config
            rates = {
                "lora": config.learning_rate,
                "core": config.core_learning_rate,
                "state": config.state_learning_rate,
            }
            alike: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
            for group, parameters in self.groups.items():
                for name, parameter in parameters.items():
                    alike.setdefault((group, self.adapted.decay_factor(name)), []).append(parameter)
            groups = [
                {"name": group, "params": members, "lr": rates[group], "weight_decay": factor * config.weight_decay}
                for (group, factor), members in alike.items()
            ]
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=torch.cuda.is_available())
            self.optimizer = optimizer
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter of this step; checkpoints keep what a control would discard, or they could not resume."""
        directory = Path(output_dir or self.args.output_dir)
        adapter_files.write(self.adapted, directory, step=self.state.global_step, run_id=self.run_id, discard=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the trainer does, then vouch for every file; drop older checkpoints only after that."""
        super()._save_checkpoint(model, trial)
        directory = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        files = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != COMPLETE)
        write_json(
            directory / COMPLETE,
            {
                "sha256": {name: file_sha256(directory / name) for name in files},
                "history": self.history,
                "eval_history": self.eval_history,
            },
        )
        keep = {self.state.global_step, self.best_step()}
        for step, path in self._checkpoints():
            if step not in keep:
                shutil.rmtree(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put the checkpoint's adapter, both halves, into the model; the trainer loads optimiser, schedule and RNG."""
        adapter_files.fill(self.adapted, adapter_files.read(Path(resume_from_checkpoint)))

    def find_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """Return the latest complete checkpoint, and the incomplete ones that were removed."""
        removed: list[Path] = []
        for _, path in reversed(self._checkpoints()):
            facts = _complete_facts(path)
            if facts is not None:
                self.history, self.eval_history = facts["history"], facts["eval_history"]
                return path, removed
            shutil.rmtree(path)
            removed.append(path)
        return None, removed

    def is_last(self, checkpoint: Path) -> bool:
        """Whether the checkpoint is of the run's last step; its adapter is then in the model, and nothing is left to train.

        The trainer would take one step more: it looks for its end only after a step.
        """
        if int(checkpoint.name.removeprefix(PREFIX)) < self.args.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        return True

    def best_step(self) -> int:
        """The evaluated step with the lowest validation loss; the current step when none was evaluated."""
        if not self.eval_history:
            return int(self.state.global_step)
        return int(min(self.eval_history, key=lambda entry: entry["eval_loss"])["step"])

    def restore_best(self) -> None:
        """Put the best checkpoint back as a whole, adapter and core of the same step."""
        saved = dict(self._checkpoints())
        best = self.best_step()
        if best not in saved:
            best = max(saved)
        adapter_files.fill(self.adapted, adapter_files.read(saved[best]))
        self.restored_step = best

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = []
        for path in Path(self.args.output_dir).glob(f"{PREFIX}*"):
            step = path.name.removeprefix(PREFIX)
            if step.isdigit():
                found.append((int(step), path))
        return sorted(found)


def grouped_parameters(adapted: AdaptedModel) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Return the trained parameters by optimiser group and name; groups without any are absent."""
    groups: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in adapted.trained_parameters().items():
        groups.setdefault(adapted.optimizer_group(name), {})[name] = parameter
    return groups


def _complete_facts(directory: Path) -> dict[str, Any] | None:
    """The facts of a checkpoint's complete.json when every file is as it was written, else None."""
    import json

    try:
        facts: dict[str, Any] = json.loads((directory / COMPLETE).read_text(encoding="utf-8"))
        whole = all(file_sha256(directory / name) == value for name, value in facts["sha256"].items())
    except (OSError, ValueError, KeyError):
        return None
    return facts if whole else None
