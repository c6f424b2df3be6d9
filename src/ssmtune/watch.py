"""What happens around an optimiser step: clipping by group, stopping on anything not finite or dead, history, progress bar."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ssmtune.component import BRANCH
from ssmtune.errors import TrainingFailed
from ssmtune.methods.base import get_method

if TYPE_CHECKING:
    from ssmtune.sft import EditTrainer


class Watch(TrainerCallback):
    """Clips each optimiser group, stops on anything not finite or dead, holds A_log in bounds, and keeps the history."""

    def __init__(self, trainer: EditTrainer) -> None:
        self.trainer = trainer
        self.norms: dict[str, float] = {}
        self.tokens = 0
        self.since = time.time()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.since = time.time()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        groups = self.trainer.groups
        if state.global_step == 0:
            sites = self.trainer.adapted.plan.sites
            _refuse_dead(groups, {name for site in sites for name in get_method(site.method).waits})
        config = self.trainer.optimizer_config
        norms = {name: _grad_norm(parameters) for name, parameters in groups.items()}
        self.norms = {name: float(norm) for name, norm in norms.items()}
        bad = [name for name, norm in self.norms.items() if not math.isfinite(norm)]
        if bad:
            raise TrainingFailed(_not_finite_message(groups, bad, state, args))
        joint = math.sqrt(sum(norm**2 for norm in self.norms.values()))
        for name, parameters in groups.items():
            norm = joint if config.clip == "joint" else self.norms[name]
            if norm > config.clip_norm:
                torch._foreach_mul_(_gradients(parameters), config.clip_norm / norm)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.guard.apply()
        # The step that was just made is counted only after this.
        self.trainer.schedules.after_step(state.global_step + 1, state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            now, tokens = time.time(), self.trainer.tokens_seen
            self.trainer.history.append(
                {
                    "step": state.global_step,
                    "loss": float(logs["loss"]),
                    "lr": float(logs.get("learning_rate", 0.0)),
                    "grad_norm": dict(self.norms),
                    "tokens_per_s": (tokens - self.tokens) / max(now - self.since, 1e-9),
                }
            )
            self.tokens, self.since = tokens, now

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self.trainer.eval_history.append({"step": state.global_step, "eval_loss": float(metrics["eval_loss"])})
        self.since = time.time()


def _grad_norm(parameters: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    norms = torch._foreach_norm(_gradients(parameters))
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.float() for n in norms]))
    return norm


def _gradients(parameters: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters.values() if p.grad is not None]


def _refuse_dead(groups: dict[str, dict[str, torch.nn.Parameter]], waiting: set[str]) -> None:
    """Every trained tensor has a gradient at the first step, zero only where a factor that starts at zero multiplies it.

    Of a branch, whose gate or output starts at zero, one tensor must have one that is not zero.
    """
    gradients = {name: p.grad for parameters in groups.values() for name, p in parameters.items()}
    branches = {name.rpartition(".")[0] for name in gradients if BRANCH in name.split(".")}
    awake = {name.rpartition(".")[0] for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    dead = [
        name
        for name, gradient in gradients.items()
        if gradient is None
        or not (
            any(part in name for part in waiting) or name.rpartition(".")[0] in branches & awake or bool(gradient.any())
        )
    ]
    if dead:
        raise TrainingFailed(
            f"{len(dead)} trained tensors get no gradient on the first step ({', '.join(dead[:3])}): the forward does not "
            "use them. Nothing was trained. 'ssmtune inspect MODEL' shows how each path uses each tensor."
        )


def _not_finite_message(groups: Any, bad: list[str], state: TrainerState, args: Any) -> str:
    names = [n for group in bad for n, p in groups[group].items() if not bool(torch.isfinite(p.grad).all())]
    return (
        f"step {state.global_step + 1}: the gradient of group {', '.join(bad)} is not finite, first in "
        f"{names[0] if names else 'no single tensor'}; training stopped before the step. Checkpoints of earlier steps "
        f"are kept in {args.output_dir}. Lower the learning rate of that group, or check the data of this step."
    )


class ProgressBar(TrainerCallback):
    """One line: steps, loss, tokens per second, time left."""

    def __init__(self, trainer: EditTrainer) -> None:
        self.trainer = trainer
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.start()
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, facts="")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        facts = ""
        if self.trainer.history:
            last = self.trainer.history[-1]
            facts = f"loss {last['loss']:.3f}  {last['tokens_per_s']:,.0f} tokens/s"
        if self.trainer.eval_history:
            facts += f"  validation {self.trainer.eval_history[-1]['eval_loss']:.3f}"
        self.progress.update(self.task, completed=state.global_step, facts=facts)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.stop()
