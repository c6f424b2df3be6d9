"""Balanced truncation: Gramians, bounds and modes of systems, and of the branches of an adapted model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, cache_of, cached, logits_of, tiny_model, tiny_tokens
from tolerances import LOGITS_FP32, largest_difference

from ssmtune import truncate as truncate_function
from ssmtune.attach import attach, load
from ssmtune.balanced_truncation import (
    System,
    balance,
    bound,
    choose_order,
    empirical_observability,
    empirical_reachability,
    largest_error,
    observability,
    project,
    reachability,
    to_modes,
    to_schur,
)
from ssmtune.errors import AttachError, ConfigError
from ssmtune.methods._branch import Branch
from ssmtune.methods._dynamics import ContinuousModes
from ssmtune.packing import PackedCollator
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.truncate import system_of, truncate

MODULE = sys.modules["ssmtune.truncate"]
"""Its name in the package is the function's."""

PLAIN: Case = ("llama", "dense")

SUMMED = 1e-9
"""Sums over the memory of a system, thousands of fp64 terms, relative: 1e4 eps with room for the conditioning of a basis."""


def random_system(seed: int, *, complex_modes: bool = False, order: int = 32, width: int = 64) -> System:
    """S4D at its random start, as in the published code: order 32 between 64 inputs and outputs."""
    torch.manual_seed(seed)
    return system_of(Branch(width, order, ContinuousModes(order, complex_modes=complex_modes, backend="fft"), gates=1))


@pytest.mark.parametrize("complex_modes", [False, True])
def test_exact_gramians(complex_modes: bool) -> None:
    """Against the closed form of diagonal systems, and against the equations that define them."""
    system = random_system(0, complex_modes=complex_modes)
    W_c, W_o = reachability(system), observability(system)
    for gramian, A, first in ((W_c, system.A, system.B @ system.B.T), (W_o, system.A.T, system.C.T @ system.C)):
        residual = A @ gramian @ A.T - gramian + first
        assert float(residual.abs().max()) <= SUMMED * float(gramian.abs().max())
    if not complex_modes:
        a = system.A.diagonal()
        closed = (system.B @ system.B.T) / (1 - a[:, None] * a)
        assert float((W_c - closed).abs().max()) <= SUMMED * float(closed.abs().max())


def test_empirical_gramians_approach_the_exact_ones() -> None:
    a = torch.tensor([0.9, 0.5, -0.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    B, C = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 2), (2, 3)))
    system = System(a.diag(), B, C)
    state, states = torch.zeros(500, 3, dtype=torch.float64), []
    for _ in range(200):
        state = a * state + torch.randn(500, 2, dtype=torch.float64, generator=generator) @ B.T
        states.append(state)
    exact = reachability(system)
    # 75,000 samples, of which one in ten is independent of the last: a relative error of about 1 / sqrt(7,500).
    found = empirical_reachability(torch.stack(states[50:]).flatten(0, 1))
    assert float((found - exact).abs().max()) <= 0.05 * float(exact.abs().max())
    seen = empirical_observability(system, 300)
    assert float((seen - observability(system)).abs().max()) <= SUMMED * float(seen.abs().max())
    assert float((empirical_observability(system, 3) - seen).abs().max()) > 0.01 * float(seen.abs().max())


def test_balanced_coordinates() -> None:
    """Both Gramians of the balanced system are the diagonal of Hankel singular values, and the bases are each other's inverse."""
    system = random_system(1)
    W_c, W_o = reachability(system), observability(system)
    sigma, W, T = balance(W_c, W_o)
    order = 12
    eye = torch.eye(order, dtype=torch.float64)
    assert float((W[:order] @ T[:, :order] - eye).abs().max()) <= 1e-6  # sigma_12 is 1e-2 of the first
    assert float((W[:order] @ W_c @ W[:order].T - sigma[:order].diag()).abs().max()) <= SUMMED
    assert float((T[:, :order].T @ W_o @ T[:, :order] - sigma[:order].diag()).abs().max()) <= SUMMED
    assert bool((sigma.diff() <= 0).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_error_keeps_below_the_bound_and_the_wrong_methods_do_not_come_near(seed: int) -> None:
    """A random S4D system of order 32, 64 by 64. Published for one such draw: 0.33, 0.17 and 0.09 at order 4, 8 and 16.

    Another draw may differ by a factor of 1.5. The planted faults are those of the published code: bases that do not
    belong together (eigenvectors of one Gramian on the left, of the other on the right), and keeping the diagonal of
    the reduced matrix alone.
    """
    system = random_system(seed)
    W_c, W_o = reachability(system), observability(system)
    sigma, W, T = balance(W_c, W_o)
    left, right = torch.linalg.svd(W_o)[0], torch.linalg.svd(W_c)[0]
    for order, published in ((4, 0.33), (8, 0.17), (16, 0.09)):
        reduced = project(system, W[:order], T[:, :order])
        error = largest_error(system, reduced)
        assert error <= bound(sigma, order)
        assert published / 1.5 <= error <= 1.5 * published
        assert reduced.spectral_radius < 1
        mismatched = project(system, left[:, :order].T, right[:, :order])
        assert largest_error(system, mismatched) > 4 * error
        diagonal = System(reduced.A.diagonal().diag(), reduced.B, reduced.C)
        if order > 4:  # of order 4, balanced, it is nearly diagonal
            assert largest_error(system, diagonal) > 2 * error


@pytest.mark.parametrize("complex_modes", [False, True])
def test_modes_are_the_system(complex_modes: bool) -> None:
    """Pairs are kept: of the reduced system of order 16 some modes are complex although the full one has none."""
    system = random_system(0, complex_modes=complex_modes)
    sigma, W, T = balance(reachability(system), observability(system))
    reduced = project(system, W[:16], T[:, :16])
    modal = to_modes(reduced)
    assert len(modal.pairs) >= 1 and len(modal.real) + 2 * len(modal.pairs) == 16
    blocks = [[[z.real, -z.imag], [z.imag, z.real]] for z in modal.pairs]
    A = torch.block_diag(modal.real.diag(), *torch.tensor(blocks, dtype=torch.float64))
    size = largest_error(system, System(system.A[:0, :0], system.B[:0], system.C[:, :0]))
    assert largest_error(reduced, System(A, modal.B, modal.C)) <= SUMMED * size
    assert largest_error(reduced, to_schur(reduced)) <= SUMMED * size
    # Planted fault: one of each pair, without its conjugate's share.
    halved = torch.cat([modal.C[:, : len(modal.real)], modal.C[:, len(modal.real) :] / 2], 1)
    assert largest_error(reduced, System(A, modal.B, halved)) > 1e-3 * size


def test_modes_that_fall_together_are_noticed() -> None:
    A = torch.tensor([[0.9, 1.0, 0.0], [0.0, 0.9, 1.0], [0.0, 0.0, 0.9]], dtype=torch.float64)
    ones = torch.ones(3, 3, dtype=torch.float64)
    assert to_modes(System(A, ones, ones)).condition > 1e6
    assert largest_error(System(A, ones, ones), to_schur(System(A, ones, ones))) <= 1e-6  # of a response of 1e3


def test_orders_by_each_rule() -> None:
    sigma = torch.tensor([1.0, 0.5, 0.05, 0.005], dtype=torch.float64)
    assert choose_order(sigma, rank=3) == 3
    assert choose_order(sigma, eps=0.05) == 3
    assert (
        choose_order(sigma, tol=0.11) == 2 and choose_order(sigma, tol=0.109) == 3 and choose_order(sigma, tol=0.0) == 4
    )
    with pytest.raises(ConfigError, match="rank=5: the branch has order 4"):
        choose_order(sigma, rank=5)
    with pytest.raises(ConfigError, match="one of rank, tol and eps"):
        choose_order(sigma, rank=2, eps=0.1)


def trained(*, complex_modes: bool = False, gate: str = "scalar") -> Any:
    """Hankel branches beside LoRA, all moved, with open gates; slow modes, so that the state matters."""
    options = {"order": 12, "complex_modes": complex_modes, "gate": gate, "init_gate": 2.0}
    edits = (
        Edit(method="hankel", select=("block.mlp",), options=options),
        Edit(method="lora", select=("attention",)),
    )
    torch.manual_seed(3)
    adapted = attach(tiny_model(PLAIN), make_plan(tiny_model(PLAIN), Recipe(name="both", edits=edits)))
    with torch.no_grad():
        for name, parameter in adapted.trained_parameters().items():
            if "lora_" in name or name.endswith(".gate"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return adapted.eval()


@pytest.mark.parametrize("form", ["modes", "matrix"])
@pytest.mark.parametrize(("complex_modes", "gate"), [(False, "scalar"), (True, "channel")])
def test_a_truncated_model(
    complex_modes: bool, gate: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the full one, saved and loaded as itself, the same in every situation, and everything of it trains."""
    if form == "matrix":
        monkeypatch.setattr(MODULE, "LARGEST_CONDITION", 0.0)
    adapted = trained(complex_modes=complex_modes, gate=gate)
    tokens = tiny_tokens(PLAIN, 2, 21)
    full = logits_of(adapted, tokens)
    with adapted.disable_adapter():
        base = logits_of(adapted, tokens)
    factors = {name: p.detach().clone() for name, p in adapted.trained_parameters().items() if "lora_" in name}
    reduced = truncate(adapted, rank=8)
    found = logits_of(reduced, tokens)
    assert 0 < largest_difference(found, full) < 0.2 * largest_difference(base, full)
    for site in reduced.plan.sites:
        if site.method == "hankel_reduced":
            assert site.options["form"] == form and site.options["full_order"] == 12 and site.options["order"] == 8
            assert 0 < site.options["error"] <= site.options["bound"]
    parameters = reduced.trained_parameters()
    assert all(torch.equal(parameters[name], value) for name, value in factors.items())
    assert sum(p.numel() for p in parameters.values()) == reduced.plan.trainable
    reduced.save_pretrained(tmp_path)
    assert {
        site["options"].get("order") for site in json.loads((tmp_path / "ssmtune.json").read_text())["plan"]["sites"]
    } == {8, None}
    assert torch.equal(logits_of(load(tiny_model(PLAIN), tmp_path), tokens), found)
    with torch.no_grad():
        first = reduced(input_ids=tokens[:, :9], use_cache=True)
        second = reduced(input_ids=tokens[:, 9:20], use_cache=True, **cached(PLAIN, cache_of(PLAIN, first)))
        third = reduced(input_ids=tokens[:, 20:], use_cache=True, **cached(PLAIN, cache_of(PLAIN, second)))
    pieces = torch.cat([first.logits, second.logits, third.logits], 1)
    assert largest_difference(pieces, found) <= LOGITS_FP32
    ids = tokens[0].tolist()
    batch = PackedCollator(pad_token_id=0)([{"input_ids": ids, "labels": ids, "seq_lengths": [8, 13]}])
    packed = logits_of(reduced, batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert largest_difference(packed[:, 8:], logits_of(reduced, tokens[:1, 8:])) <= LOGITS_FP32
    reduced.train()(input_ids=tokens, use_cache=False).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for p in reduced.trained_parameters().values())
    with pytest.raises(AttachError, match="cannot save this adapted model: it was truncated before"):
        adapted.save_pretrained(tmp_path / "old")
    with pytest.raises(ConfigError, match="no Hankel branch of full order"):
        truncate(reduced, rank=4)


def test_truncation_on_data_weighs_what_texts_reach() -> None:
    """At the same order, the outputs on the very texts differ less than with exact Gramians; padding does not count."""
    texts = tiny_tokens(PLAIN, 2, 40)
    differences = {}
    for name, batches in (("exact", None), ("data", [{"input_ids": texts}])):
        adapted = trained()
        full = logits_of(adapted, texts)
        reduced = truncate(adapted, rank=3, batches=batches)
        differences[name] = float((logits_of(reduced, texts) - full).square().mean())
        assert all(s.options.get("bound") is None for s in reduced.plan.sites) == (name == "data")
    assert differences["data"] < differences["exact"]
    padded = torch.cat([torch.full((2, 5), 7), texts], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    models = [truncate(trained(), rank=3, batches=[b]) for b in (batch, {"input_ids": texts})]
    assert largest_difference(*(logits_of(model, texts) for model in models)) <= 10 * LOGITS_FP32


def test_what_cannot_be_truncated_is_refused_and_left_alone() -> None:
    adapted = trained()
    tokens = tiny_tokens(PLAIN, 1, 9)
    expected = logits_of(adapted, tokens)
    with pytest.raises(ConfigError, match="rank=13: the branch has order 12"):
        truncate(adapted, rank=13)
    with pytest.raises(ConfigError, match="no batch was given"):
        truncate(adapted, rank=3, batches=[])
    assert torch.equal(logits_of(adapted, tokens), expected)
    plain = attach(tiny_model(PLAIN), make_plan(tiny_model(PLAIN), "parallel"))
    with pytest.raises(ConfigError, match=r"no Hankel branch .*it trains parallel"):
        truncate(plain, rank=1)


def test_an_unstable_reduced_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MODULE,
        "project",
        lambda system, W, T: System(1.01 * torch.eye(len(W)).double(), W @ system.B, system.C @ T),
    )
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.branch: truncated to order 4 .* not stable .*1\.01"):
        truncate(trained(), rank=4)


def test_a_branch_of_which_one_mode_is_left() -> None:
    reduced = truncate(trained(), rank=1)
    assert {s.options["order"] for s in reduced.plan.sites if s.method == "hankel_reduced"} == {1}
    assert {s.options["num_pairs"] for s in reduced.plan.sites if s.method == "hankel_reduced"} == {0}


def test_truncate_is_public() -> None:
    assert truncate_function is truncate
