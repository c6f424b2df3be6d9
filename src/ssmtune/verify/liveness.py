"""Every trained tensor acts on every execution path, and gets a gradient wherever one is defined.

On path decode the cache comes from before the perturbation, so only what the single step itself does can show; but for what
acts at the start of a sequence, every step is run again.
Its single-step operations write the state in place and have no gradient; the finite perturbation stands for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ssmtune.methods.base import get_method
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import (
    PATHS,
    in_fp32,
    moved_values,
    noise_like,
    path_logits,
    prefill_cache,
    relative_difference,
    step_logits,
)

NUM_TOKENS = 9
NOISE_FACTOR = 10
SIZES = (1, 10, 30)
"""A change that a coarse dtype rounds away is tried again larger; what is not used stays at zero whatever the size."""
FROM_START = "decode from the first token"
GRADIENT_PATHS = ("train", "eval", "prefill")


def _run(subject: Subject) -> CheckResult:
    with in_fp32(subject.adapted):
        return _run_fp32(subject)


def _run_fp32(subject: Subject) -> CheckResult:
    """Measured: the smallest relative change of the logits by one tensor on one path, 0 for a dead gradient.

    Limit: ten times what repeating the same pass changes, 0 on a CPU: a tensor that is not used changes nothing.
    """
    adapted = subject.adapted
    adapted.require_gradients()
    parameters = adapted.trained_parameters()
    device = adapted.base_model.model.device
    ids_BT = subject.documents[0][:NUM_TOKENS][None].to(device)
    generator = torch.Generator().manual_seed(1)
    changes: dict[str, float] = {}
    with moved_values(parameters):
        gradients = _gradients(subject, parameters, ids_BT)
        with torch.no_grad():
            at_start = _acting_at_start(subject)
            passes = _passes(subject, ids_BT)
            if at_start:
                passes[FROM_START] = lambda: path_logits(adapted, "decode", ids_BT)
            baseline = {path: run() for path, run in passes.items()}
            repeated = max(relative_difference(run(), baseline[path]) for path, run in passes.items())
            limit = NOISE_FACTOR * repeated
            for name, parameter in parameters.items():
                before = parameter.clone()
                noise = noise_like(parameter, generator)
                skipped = "decode" if name in at_start else FROM_START
                for path, run in passes.items():
                    if path == skipped:
                        continue
                    for size in SIZES:
                        parameter.copy_(before + size * noise)
                        change = relative_difference(run(), baseline[path])
                        if change > limit:
                            break
                    changes[f"{name} on path {path}"] = change
                parameter.copy_(before)
    dead = [where for where, change in changes.items() if change <= limit]
    dead += [where for where in gradients if where not in dead]
    weakest = min(changes, key=lambda where: changes[where])
    found = f"{len(dead)} dead: {_listed(dead)}"
    if not dead:
        found = f"each changes the logits and has a gradient; weakest: {weakest}"
    return CheckResult(
        name="liveness",
        ok=not dead,
        measured=0.0 if gradients else changes[weakest],
        limit=limit,
        where=_listed(dead) if dead else weakest,
        detail=f"{len(parameters)} tensors on {len(PATHS)} paths; {found}",
    )


def _acting_at_start(subject: Subject) -> set[str]:
    """Names of the trained tensors that act where a sequence begins, and on later steps through the cache alone."""
    plan, edits = subject.adapted.plan, subject.adapted.edits
    sites = [site for site in plan.sites if get_method(site.method).acts_at_start]
    return {f"{s.key}.{name}" if name else s.key for s in sites for name in edits[s.key].trained()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _passes(subject: Subject, ids_BT: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    model = subject.adapted
    cache = prefill_cache(model, ids_BT[:, :-1])
    return {
        "train": lambda: path_logits(model, "train", ids_BT),
        "eval": lambda: path_logits(model, "eval", ids_BT),
        "prefill": lambda: path_logits(model, "prefill", ids_BT),
        "decode": lambda: step_logits(model, ids_BT[:, -1:], cache),
    }


def _gradients(subject: Subject, parameters: dict[str, torch.nn.Parameter], ids_BT: torch.Tensor) -> list[str]:
    """Tensor and path of every gradient of the language-modelling loss that is absent, zero or not finite."""
    dead = []
    for path in GRADIENT_PATHS:
        with torch.enable_grad():
            logits_BTV = path_logits(subject.adapted, path, ids_BT).float()
            loss = F.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:])
            gradients: tuple[torch.Tensor | None, ...] = (None,) * len(parameters)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is None or not bool(gradient.any()) or not bool(torch.isfinite(gradient).all()):
                dead.append(f"{name} on path {path}")
    return dead


CHECK = Check(
    proves="each trained tensor changes the logits on every path and has a finite, non-zero gradient", run=_run
)
