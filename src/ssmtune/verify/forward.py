"""Run a model on one execution path, compare logits, and move every trained value for the length of a block.

Dimensions: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ssmtune.families.base import find_family

PATHS = ("train", "eval", "prefill", "decode")
"""Training without dropout and cache, evaluation, one pass with a cache, token by token with a cache."""

TOLERANCE = {
    # Largest difference of two logits, relative to the largest logit.
    # fp32: sums of some hundred terms in another order, through tens of layers (eps 1.2e-7; measured 1e-7 to 3e-6).
    torch.float32: 1e-5,
    # fp64: the scan's and the step's arithmetic stay fp64, eps 2.2e-16.
    torch.float64: 1e-12,
    # Only merging and stock PEFT are compared in the model's own dtype; the other checks widen it (`in_fp32`).
    # bf16 and fp16: every layer rounds its output to 8 or 11 bits, and another order of operations rounds elsewhere:
    # a few units in the last place (2^-8, 2^-11) add up over the layers. A lost adapter or a leak is 10 % and more.
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}

STEP_TOLERANCE = {
    # Step by step against a scan in chunks of 64. In fp32 the scan's decays are exp of differences of running sums,
    # whose error grows with the sums: measured up to 1.1e-5 on two layers. A path that leaves out one adapter is 1e-2
    # and more away.
    **TOLERANCE,
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}

MATRIX_NOISE = 0.3
VECTOR_NOISE = 0.1
SMALLEST = 1e-30


def tolerance(model: nn.Module, table: Mapping[torch.dtype, float] = TOLERANCE) -> float:
    """The tolerance for the coarsest dtype among the model's parameters: what it computes in."""
    return max(table[p.dtype] for p in model.parameters() if p.is_floating_point())


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Run the block in training mode with dropout off, LoRA's and attention's; the modes are left for the caller."""
    model.train()
    rates = {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        if vars(module).get("attention_dropout"):
            rates[module] = vars(module)["attention_dropout"]
            vars(module)["attention_dropout"] = 0.0
    try:
        yield
    finally:
        for module, rate in rates.items():
            vars(module)["attention_dropout"] = rate


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Run the block with every parameter of a narrower dtype widened to fp32, then give each its own tensor back.

    Widening is exact, so it is the same model without the rounding that would drown what a check looks for; on a CPU
    it is also several times faster. It costs the fp32 copy in memory.
    """
    narrow = [p for p in model.parameters() if p.is_floating_point() and p.element_size() < 4]
    saved = [p.data for p in narrow]
    for p in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, data in zip(narrow, saved, strict=True):
            p.data = data


def path_logits(model: Any, path: str, ids_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Return the logits [B, T, V] of one path of `PATHS`; `inputs` go to the model as they are."""
    if path == "train":
        with without_dropout(model):
            return _logits(model(input_ids=ids_BT, use_cache=False, **inputs))
    model.eval()
    if path != "decode":
        return _logits(model(input_ids=ids_BT, use_cache=path == "prefill", **inputs))
    cache, steps = None, []
    for step in range(ids_BT.shape[1]):
        state: dict[str, Any] = {} if cache is None else {cache_name(model): cache}
        output = model(input_ids=ids_BT[:, step : step + 1], use_cache=True, **state, **inputs)
        cache = output[cache_name(model)]
        steps.append(_logits(output))
    return torch.cat(steps, dim=1)


def cache_name(model: Any) -> str:
    """Return the name under which the model takes and returns its cache."""
    return find_family(model.config.model_type)[1].cache


def _logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output.logits
    return logits


def prefill_cache(model: Any, ids_BT: torch.Tensor) -> Any:
    """Return the cache after `ids_BT`."""
    model.eval()
    return model(input_ids=ids_BT, use_cache=True)[cache_name(model)]


def step_logits(model: Any, ids_BT: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits [B, 1, V] of one token after `cache`, which is not changed."""
    model.eval()
    return _logits(model(input_ids=ids_BT, use_cache=True, **{cache_name(model): deepcopy(cache)}))


def relative_difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return max |logits - expected| / max |expected|; infinite when either is not finite."""
    if not bool(torch.isfinite(logits).all() and torch.isfinite(expected).all()):
        return math.inf
    scale = float(expected.abs().max().double().clamp_min(SMALLEST))
    return float((logits.double() - expected.double()).abs().max()) / scale


def worst_position(logits_TV: torch.Tensor, expected_TV: torch.Tensor) -> int:
    """Return the position of the largest difference."""
    return int((logits_TV.double() - expected_TV.double()).abs().amax(-1).argmax())


def noise_like(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return noise that changes what a tensor does by tens of percents, scaled by the number of its inputs."""
    std = MATRIX_NOISE / math.sqrt(values.shape[-1]) if values.dim() > 1 else VECTOR_NOISE
    drawn = torch.randn(values.shape, generator=generator) * std
    return drawn.to(values.device, values.dtype)


@contextmanager
def moved_values(parameters: dict[str, nn.Parameter], *, seed: int = 0) -> Iterator[None]:
    """Add noise to every parameter for the length of the block, then put the exact values back.

    A zero-initialised factor would hide whatever happens to its partner; after this none is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for p in parameters.values():
                p.add_(noise_like(p, generator))
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
