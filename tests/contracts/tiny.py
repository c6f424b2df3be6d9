"""Tiny models of every family for the contract tests, with weights that matter.

transformers' own initialisation (normal, 0.02; core at constants) makes logits so flat that a missed document or token
hides in the rounding; here every tensor is drawn at the size that trained models have.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ssmtune.families.base import family_names, get_family
from ssmtune.inventory import Inventory, take_inventory

Case = tuple[str, str]

CASES: tuple[Case, ...] = tuple(
    (family, name) for family in family_names() for name in sorted(get_family(family).tiny_configs())
)
CASE_IDS = tuple("-".join(case) for case in CASES)
RECURRENT_CASES = tuple(case for case in CASES if get_family(case[0]).recurrent_module is not None)
RECURRENT_IDS = tuple("-".join(case) for case in RECURRENT_CASES)


def tiny_config(case: Case) -> Any:
    """A fresh copy of the case's config."""
    return copy.deepcopy(get_family(case[0]).tiny_configs()[case[1]])


@lru_cache
def tiny_inventory(case: Case) -> Inventory:
    """Inventory of the case's model, without weights."""
    with torch.device("meta"):
        return take_inventory(AutoModelForCausalLM.from_config(tiny_config(case)))


@lru_cache
def _weights(case: Case) -> tuple[Any, dict[str, torch.Tensor]]:
    # Building draws random numbers, and only the first call builds: a test that seeds must not see the difference.
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(tiny_config(case), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator))
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(shape, generator=generator) * 3 - 1
    if name.endswith("dt_bias"):
        return noise - 1.5
    if name.endswith((".D", "norm.weight", "layernorm.weight")):
        return 1 + 0.2 * noise
    if len(shape) == 1:
        return 0.2 * noise
    if "embed_tokens" in name:
        return 0.5 * noise
    # Fan-in, with a gain that keeps attention and gates away from uniform.
    return 1.5 * noise / math.sqrt(shape[-1])


def tiny_model(case: Case, *, dtype: torch.dtype = torch.float32) -> Any:
    """A new model of the case, in eval mode; equal weights at every call."""
    model, weights = _weights(case)
    with torch.random.fork_rng():
        new = type(model)(tiny_config(case))
    new.load_state_dict(weights)
    if dtype == torch.bfloat16:
        # The grouped product of bf16 experts needs rows of a multiple of 16 bytes, which tiny experts do not have.
        new.config._experts_implementation = "eager"
    return new.to(dtype).eval()


def tiny_tokens(case: Case, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids that are neither padding nor special."""
    vocabulary = tiny_config(case).vocab_size
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def randomise(adapted: Any, *, scale: float = 0.1, seed: int = 1) -> None:
    """Move every trained tensor away from its start, so that the adapters act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter.dtype))


def logits_of(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [B, T, V] without gradient."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids, **options).logits
    return logits


def loss_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=input_ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())
