"""A_log stays within its bound whatever a step does to it, and every recurrence has its memory horizon reported."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.tiny import CASES, Case, loss_of, tiny_config, tiny_inventory, tiny_model, tiny_tokens
from tolerances import OP_FP32

from ssmtune.attach import attach
from ssmtune.base_tensors import base_tensor
from ssmtune.core_guard import FASTEST, SLOWEST, STEPS, DecayGuard
from ssmtune.core_report import describe_core
from ssmtune.families.base import get_family
from ssmtune.plan import Plan, make_plan
from ssmtune.recipe import Edit, Recipe

FIRST = tuple(next(members) for _, members in itertools.groupby(CASES, key=lambda case: case[0]))
WITH_CORE = tuple(case for case in FIRST if any(c.group == "core" for c in tiny_inventory(case).components))
BOUNDED = tuple(c for c in WITH_CORE if get_family(c[0]).decay_bound(tiny_config(c).get_text_config()) is not None)
"""Cases whose gate is bounded by a sigmoid."""
GUARDED = tuple(c for c in WITH_CORE if c[0] in ("mamba", "granite_hybrid", "qwen3_5", "kimi_linear", "s4d"))
"""One case for each way in which A_log and its step lie in memory."""


@lru_cache
def core_plan(case: Case) -> Plan:
    return make_plan(tiny_model(case), "core")


def rates(adapted: Any, case: Case, layer: int | None) -> torch.Tensor:
    """exp(A_log) dt of every state of a layer, from what the model computes with now."""
    model = adapted.base_model.model
    paths = {c.role: c.path for c in tiny_inventory(case).components if c.layer == layer}
    role = next(role for role in STEPS if role in paths)
    values = []
    for path in (paths[role], paths[STEPS[role]]):
        owner, _, name = path.rpartition(".")
        values.append(getattr(model.get_submodule(owner), name).detach())
    A_log, raw = values
    dt = raw.exp() if role == "ssm.log_A_real" else F.softplus(raw)
    per_channel = A_log if A_log.dim() == 2 else A_log.reshape(-1, 1)
    return per_channel.exp() * dt.view(len(per_channel), -1)


@pytest.mark.parametrize("case", GUARDED, ids="-".join)
def test_a_step_too_far_is_put_back_onto_the_bound(case: Case) -> None:
    adapted = attach(tiny_model(case), core_plan(case))
    guard = DecayGuard(adapted)
    sites = [site for site in adapted.plan.sites if site.role in STEPS]
    deltas = [adapted.edit_parameters()[site.key] for site in sites]
    guard.apply()
    assert guard.num_held == 0 and not any(bool(d.any()) for d in deltas)
    for sign, limit in ((1, FASTEST), (-1, SLOWEST)):
        with torch.no_grad():
            for delta in deltas:
                delta.fill_(sign * 40.0)
        for site in sites:
            found = rates(adapted, case, site.layer)
            assert bool((found > FASTEST).any() if sign > 0 else (found < SLOWEST).any()), "nothing was planted"
        guard.apply()
        for site in sites:
            found = rates(adapted, case, site.layer)
            assert float(found.max()) <= FASTEST * (1 + OP_FP32) and float(found.min()) >= SLOWEST * (1 - OP_FP32)
            # Each head is held where its own step puts the bound, not where the largest of all does.
            extreme = found.amax(-1) if sign > 0 else found.amin(-1)
            assert torch.allclose(extreme, torch.full_like(extreme, limit), rtol=OP_FP32, atol=0)
    assert guard.num_held == 2 * sum(delta.numel() for delta in deltas)
    # On the bound an element still has a gradient, so it can come back.
    loss_of(adapted, tiny_tokens(case, 2, 17)).backward()
    assert all(d.grad is not None and bool(torch.isfinite(d.grad).all()) and bool(d.grad.any()) for d in deltas)


def test_what_the_base_has_outside_stays_as_it_is() -> None:
    case = ("granite_hybrid", "dense")
    model = tiny_model(case)
    path = next(c.path for c in tiny_inventory(case).components if c.role == "ssm.A_log")
    with torch.no_grad():
        model.get_parameter(path)[:] = math.log(1e4)
    adapted = attach(model, core_plan(case))
    delta = adapted.edit_parameters()[path]
    guard = DecayGuard(adapted)
    with torch.no_grad():
        delta[0], delta[1] = 1.0, -1.0
    guard.apply()
    # No further out, but back as far as it likes.
    assert delta[:3].tolist() == [0.0, -1.0, 0.0]
    assert float(base_tensor(adapted.base_model.model, path)[0]) == pytest.approx(math.log(1e4))


def test_sparse_entries_are_held_at_their_own_bounds() -> None:
    case = ("mamba", "tied")
    edits = (Edit(method="sdt", select=("allowed",), options={"selection": "random", "channel_freeze_ratio": 0.5}),)
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), Recipe(name="sdt only", edits=edits)))
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            parameter.fill_(40.0)
    guard = DecayGuard(adapted)
    guard.apply()
    site = adapted.plan.sites[0]
    edit: Any = adapted.edits[site.key]
    found = rates(adapted, case, site.layer).flatten()[edit.positions]
    assert torch.allclose(found, torch.full_like(found, FASTEST), rtol=OP_FP32, atol=0)
    # B and C have no decay and no bound.
    assert float(adapted.trained_parameters()[f"{adapted.plan.sites[-1].key}.delta"].detach()[0]) == 40.0


def test_a_gate_with_a_bound_of_its_own_is_left_alone() -> None:
    (case,) = BOUNDED
    assert DecayGuard(attach(tiny_model(case), core_plan(case))).guarded == []


@pytest.mark.parametrize("case", WITH_CORE, ids="-".join)
def test_the_horizon_of_every_recurrence_is_reported(case: Case) -> None:
    """Longer where the decay is made slower; an unmoved core keeps its horizon."""
    adapted = attach(tiny_model(case), core_plan(case))
    before = describe_core(adapted)
    assert len(before) == len(adapted.plan.sites)
    assert all(row["horizon_before"] == row["horizon_after"] > 0 for row in before)
    decays = ("A_log", "log_A_real", "Lambda", "time_decay")
    with torch.no_grad():
        for site in adapted.plan.sites:
            if site.role.endswith(decays):
                adapted.edit_parameters()[site.key].fill_(-0.5)
    for row in describe_core(adapted):
        # Inside a sigmoid a smaller factor may work either way, by the sign of the bias.
        longer = (
            row["horizon_after"] != row["horizon_before"]
            if case in BOUNDED
            else row["horizon_after"] > row["horizon_before"]
        )
        assert longer, row


def test_the_horizon_is_the_time_to_one_over_e() -> None:
    """Steps a scan of Mamba-1 whose input adds nothing to dt: after tau tokens a state is at 1/e of what it was."""
    from ssmtune.ops.mamba1_selective_scan import mamba1_selective_scan

    case = ("mamba", "tied")
    adapted = attach(tiny_model(case), core_plan(case))
    model = adapted.base_model.model
    paths = {c.role: c.path for c in tiny_inventory(case).components if c.layer == 0}
    A_log, dt_bias = (base_tensor(model, paths[role]).detach().double() for role in ("ssm.A_log", "ssm.dt_bias"))
    channels, states = A_log.shape
    num_tokens = 7
    zeros = torch.zeros(1, channels, num_tokens, dtype=torch.float64)
    nothing = torch.zeros(1, states, num_tokens, dtype=torch.float64)
    _, final = mamba1_selective_scan(
        zeros, zeros, -A_log.exp(), nothing, nothing,
        D_D=None, z_BDT=None, dt_bias_D=dt_bias, dt_softplus=True,
        initial_state_BDN=torch.ones(1, channels, states, dtype=torch.float64),
    )  # fmt: skip
    tau = -num_tokens / final[0].log()
    reported = next(row["horizon_before"] for row in describe_core(adapted) if row["layer"] == 0)
    assert reported == pytest.approx(float(tau.median()), rel=OP_FP32)
