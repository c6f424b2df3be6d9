"""Gradient accumulation, bf16 autocast and checkpointing leave the gradients of every family as they are."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
import torch
from contracts.tiny import CASES, Case, loss_of, randomise, tiny_inventory, tiny_model, tiny_tokens
from tolerances import BF16_STEPS, GRADIENTS_FP32, relative_rms

from ssmtune.attach import attach
from ssmtune.families.base import family_names
from ssmtune.plan import make_plan

Gradients = dict[str, torch.Tensor]


LATER = ("parallel_gated_delta",)
"""Families that were added later are counted last: they leave the choice of config of the others as it was."""


def _one_config_each() -> Iterator[Case]:
    """One config of every family; each family takes the next of its own, so that tied, sparse and odd ones all appear."""
    for number, family in enumerate(sorted(family_names(), key=lambda name: name in LATER)):
        cases = [case for case in CASES if case[0] == family]
        yield cases[number % len(cases)]


ONE_EACH = tuple(_one_config_each())


@pytest.fixture(scope="module")
def training(request: pytest.FixtureRequest) -> Any:
    """One adapted model of a case in training mode, adapters moved, shared by the tests, which leave it as it is."""
    case: Case = request.param
    has_core = any(c.group == "core" for c in tiny_inventory(case).components)
    model = tiny_model(case)
    # Every expert takes part: where rounding flips a choice of experts it changes the function, not its gradient.
    for router in (m for m in model.modules() if "top_k" in vars(m)):
        router.top_k = next(v for k, v in vars(router).items() if k in ("num_experts", "n_routed_experts"))
        if "topk_group" in vars(router):
            router.topk_group = router.num_group
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = attach(model, make_plan(model, "all+core" if has_core else "all", rank=3, alpha=7.0)).train()
    randomise(adapted, scale=0.03)
    return adapted


every_family = pytest.mark.parametrize(
    ("case", "training"),
    [(case, case) for case in ONE_EACH],
    ids=["-".join(case) for case in ONE_EACH],
    indirect=["training"],
    scope="module",
)


def gradients(adapted: Any, *batches: torch.Tensor, autocast: bool = False) -> Gradients:
    """Gradients of the mean loss, accumulated one batch after the other."""
    adapted.zero_grad()
    for tokens in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(adapted, tokens)
        (loss / len(batches)).backward()
    return {name: p.grad.clone() for name, p in adapted.trained_parameters().items()}


def moved_by_a_bf16_step(adapted: Any, tokens: torch.Tensor, exact: Gradients) -> dict[str, float]:
    """How far each fp32 gradient goes when every weight moves by up to one bf16 step: the median of three draws."""
    kept = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    changes: dict[str, list[float]] = {name: [] for name in exact}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                p.copy_(kept[name] * (1 + 2.0**-8 * (2 * torch.rand(p.shape, generator=generator) - 1)))
        for name, gradient in gradients(adapted, tokens).items():
            changes[name].append(relative_rms(gradient, exact[name]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.copy_(kept[name])
    return {name: median(found) for name, found in changes.items()}


def norm(found: Gradients) -> float:
    return float(torch.stack([g.square().sum() for g in found.values()]).sum().sqrt())


@every_family
def test_accumulation_gives_the_gradients_of_the_bigger_batch(case: Case, training: Any) -> None:
    tokens = tiny_tokens(case, 2, 17)
    whole = gradients(training, tokens)
    parts = gradients(training, tokens[:1], tokens[1:])
    for name, expected in whole.items():
        difference, size = (parts[name] - expected).abs(), expected.abs()
        assert difference.max() <= GRADIENTS_FP32 * size.max(), name
        assert difference.mean() <= GRADIENTS_FP32 * size.mean(), name
    assert norm(parts) == pytest.approx(norm(whole), rel=GRADIENTS_FP32)


@every_family
def test_bf16_autocast_gives_the_gradients_of_fp32_but_for_rounding(case: Case, training: Any) -> None:
    """What rounding explains is measured, since a tiny model may amplify it a hundredfold: see `BF16_STEPS`."""
    tokens = tiny_tokens(case, 2, 17)
    exact = gradients(training, tokens)
    rounded = gradients(training, tokens, autocast=True)
    allowed = {n: BF16_STEPS * change for n, change in moved_by_a_bf16_step(training, tokens, exact).items()}
    # A gradient that is lost is off by 1: most tensors must show it.
    assert median(allowed.values()) < 1
    for name, expected in exact.items():
        assert relative_rms(rounded[name], expected) <= allowed[name], name


@every_family
def test_checkpointing_under_autocast_changes_no_bit(case: Case, training: Any) -> None:
    tokens = tiny_tokens(case, 2, 17)
    expected = gradients(training, tokens, autocast=True)
    base = training.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(training, tokens, autocast=True)
    base.activation_checkpointing_disable()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
