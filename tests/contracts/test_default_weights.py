"""Models as transformers initialises them: what the fullest recipe trains is alive from the start of training.

The other contracts draw weights as trained models have them, where no initial zero can stand in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from contracts.tiny import CASE_IDS, CASES, Case, loss_of, tiny_config, tiny_inventory, tiny_tokens

from ssmtune.attach import attach
from ssmtune.models import auto_class
from ssmtune.plan import Plan, make_plan
from ssmtune.probe import PATHS, probe

LATE = {
    # transformers zeroes the weight (and bias) of every linear with "gate" in its name, the MLP's gate among them, and
    # silu(0) = 0: until the gate has moved, up is multiplied by zero, and down is fed zero. Their B then has its first
    # gradient at the second step, and their A, which waits for B, at the third.
    "xlstm": ("mlp.up", "mlp.down"),
}
"""Family -> roles whose A has its first gradient at the third step; of all others it comes at the second at the latest."""


def _fresh(case: Case) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto_class(tiny_config(case)).from_config(tiny_config(case), dtype=torch.float32)


def _plan(model: Any, case: Case) -> Plan:
    has_core = any(c.group == "core" for c in tiny_inventory(case).components)
    return make_plan(model, "all+core" if has_core else "all", rank=3)


def _dead_tensors(model: Any, plan: Plan, case: Case) -> Iterator[set[str]]:
    """The trained tensors without a finite, non-zero gradient, at each step of a training with plain gradient descent."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = attach(model, plan).train()
    parameters = adapted.trained_parameters()
    tokens = tiny_tokens(case, 2, 17)
    while True:
        adapted.zero_grad()
        loss_of(adapted, tokens).backward()
        gradients = {name: p.grad for name, p in parameters.items()}
        yield {n for n, g in gradients.items() if g is None or not (bool(g.isfinite().all()) and bool(g.any()))}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if gradients[name] is not None:
                    parameter.sub_(0.1 * gradients[name])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_trained_tensor_is_alive_by_the_second_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _fresh(case)
    probed = lru_cache(probe)  # the plan's own, looked at again
    monkeypatch.setattr("ssmtune.plan.probe", probed)
    plan = _plan(model, case)
    for site in plan.sites:
        found = probed(model).of(site.path)
        assert tuple(found) == PATHS and set(found.values()) <= {"CALL", "READ"}, (site.path, found)
    late = {site.path.removesuffix(".weight") for site in plan.sites if site.role in LATE.get(case[0], ())}
    steps = _dead_tensors(model, plan, case)
    next(steps)
    second = next(steps)
    assert second == {f"base_model.model.{module}.lora_A.default.weight" for module in late}
    assert not late or next(steps) == set()


def test_a_weight_of_zero_in_the_way_is_seen() -> None:
    """Planted fault: behind an output projection of zero, what feeds it starts a step late."""
    case = ("granite_hybrid", "dense")
    model = _fresh(case)
    with torch.no_grad():
        model.model.layers[0].mamba.out_proj.weight.zero_()
    steps = _dead_tensors(model, _plan(model, case), case)
    assert {"model.layers.0.mamba.A_log", "model.layers.0.mamba.dt_bias", "model.layers.0.mamba.D"} <= next(steps)
    assert next(steps) == {"base_model.model.model.layers.0.mamba.in_proj.lora_A.default.weight"}
