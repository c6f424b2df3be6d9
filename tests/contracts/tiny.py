"""Tiny models of every family for the contract tests, with weights that matter.

transformers' own initialisation (normal, 0.02; core at constants) makes logits so flat that a missed document or token
hides in the rounding; here every tensor is drawn at the size that trained models have.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from tolerances import AMPLIFIED, FP32_EPS, LOGITS_FP32, ROUNDINGS, largest_difference

from ssmtune.families.base import family_names, get_family
from ssmtune.inventory import Inventory, take_inventory
from ssmtune.models import auto_class, weightless
from ssmtune.operations import recurrent_modules
from ssmtune.ops.seam import Call

Case = tuple[str, str]

CASES: tuple[Case, ...] = tuple(
    (family, name) for family in family_names() for name in sorted(get_family(family).tiny_configs())
)
CASE_IDS = tuple("-".join(case) for case in CASES)
RECURRENT_CASES = tuple(case for case in CASES if get_family(case[0]).recurrent_classes)
RECURRENT_IDS = tuple("-".join(case) for case in RECURRENT_CASES)


def tiny_config(case: Case) -> Any:
    """A fresh copy of the case's config."""
    return copy.deepcopy(get_family(case[0]).tiny_configs()[case[1]])


@lru_cache
def tiny_inventory(case: Case) -> Inventory:
    """Inventory of the case's model, without weights."""
    return take_inventory(weightless(tiny_config(case)))


@lru_cache
def _weights(case: Case) -> tuple[Any, dict[str, torch.Tensor]]:
    # Building draws random numbers, and only the first call builds: a test that seeds must not see the difference.
    with torch.random.fork_rng():
        config = tiny_config(case)
        model = auto_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def _draw(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = parameter.shape
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.rand(shape, generator=generator) * 3 - 1
    if name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
        return noise - 1.5
    if name.endswith(".D"):
        return 1 + 0.2 * noise
    if name.endswith("recurrent_param"):
        # Decays of 0.1 to 0.9 a step: a state that reaches a few tokens.
        return noise - 2.5
    if name.endswith(("log_dt", "log_A_real")):
        return 0.5 * noise - 1
    if name.endswith("A_imag"):
        return 3 * noise
    if name.endswith(("igate_preact.bias", "fgate_preact.bias")):
        # As trained: what is written is small and kept long. Otherwise the memory is divided by sums that cancel.
        return noise + (2 if "fgate" in name else -3)
    if name.endswith("time_decay"):
        return noise - 1.5
    if "time_mix" in name:
        return torch.rand(shape, generator=generator)
    if re.search(r"(ln\w*|ln_out)\.weight$", name):
        return parameter + 0.2 * noise
    if "norm" in name and name.endswith("weight"):
        # Around the initial value, which is 0 where the layer adds the 1 itself.
        return parameter + 0.2 * noise
    if len(shape) == 1:
        return 0.2 * noise
    if "embed" in name:
        return 0.5 * noise
    # Products of several projections (dt, B, C and their input), and blocks without a residual connection of their own,
    # grow with a power of the gain, and so does their rounding.
    if "x_proj" in name:
        return 0.3 * noise / math.sqrt(shape[-1])
    if "adapter_list" in name:
        return 0.3 * noise / math.sqrt(shape[-1])
    if "shared_transf" in name or name.endswith(".linear.weight"):
        return 0.6 * noise / math.sqrt(shape[-1])
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
    vocabulary = tiny_config(case).get_text_config().vocab_size
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def randomise(adapted: Any, *, scale: float = 0.1, seed: int = 1) -> None:
    """Move every trained tensor away from its start, so that the adapters act."""
    move(adapted.trained_parameters(), scale=scale, seed=seed)


def move(parameters: Mapping[str, torch.nn.Parameter], *, scale: float = 0.1, seed: int = 1) -> None:
    """Add noise to parameters, in place; equal seeds add equal noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter.dtype))


def logits_of(model: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [B, T, V] without gradient."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids, **options).logits
    return logits


def rounding_effect(model: Any, input_ids: torch.Tensor) -> float:
    """Largest difference of the logits when each element of the embeddings [B, T, d] is off by one rounding, up or down."""
    generator = torch.Generator().manual_seed(0)

    def nudge(_: torch.nn.Module, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, embeddings.shape, generator=generator) * 2 - 1
        return embeddings * (1 + FP32_EPS * signs)

    expected = logits_of(model, input_ids)
    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        return max(largest_difference(logits_of(model, input_ids), expected) for _ in range(4))
    finally:
        handle.remove()


def assert_same_logits(
    found: torch.Tensor, expected: torch.Tensor, model: Any, input_ids: torch.Tensor, limit: float = LOGITS_FP32
) -> None:
    """Two ways to the same logits agree to `limit`, or to what rounding alone does to `model` on `input_ids`."""
    difference = largest_difference(found, expected)
    if difference > limit:
        limit = max(limit, min(AMPLIFIED, ROUNDINGS * rounding_effect(model, input_ids)))
    assert difference <= limit


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """Two ways to the same logits give every parameter the same gradient, none of them zero."""
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad((logits * weight).mean(), parameters) for logits in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert bool(other.any())
        assert largest_difference(mine / other.abs().max(), other / other.abs().max()) <= 10 * LOGITS_FP32


def operation_names(case: Case) -> set[str]:
    """Names of the functions that the case's recurrent layers call and ssmtune replaces."""
    family = get_family(case[0])
    if family.operations is None:
        return set()
    model = weightless(tiny_config(case))
    return {name for module in recurrent_modules(model, family) for name in family.operations(module, Call())}


def cached(case: Case, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to the case's model; none where there is no cache yet."""
    return {} if cache is None else {get_family(case[0]).cache: cache}


def cache_of(case: Case, output: Any) -> Any:
    """The cache in a model's output."""
    return output[get_family(case[0]).cache]


def loss_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token."""
    logits = model(input_ids=input_ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())
