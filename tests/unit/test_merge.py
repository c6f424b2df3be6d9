"""Merging: fp32 sums rounded once, and the report of what a narrower dtype leaves of a change."""

from __future__ import annotations

import pytest
import torch
from contracts.tiny import logits_of, randomise, tiny_inventory, tiny_model, tiny_tokens

from ssmtune.attach import attach, load
from ssmtune.merge import effective_tensors, merge, survival_report
from ssmtune.plan import make_plan
from ssmtune.rounding import survival_by_role

DENSE = ("granite_hybrid", "dense")


def test_bf16_merge_rounds_the_fp32_sum_once() -> None:
    """By hand: round(W + alpha / r * B A) and round(W + delta), the sums in fp32."""
    model = tiny_model(DENSE, dtype=torch.bfloat16)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = attach(model, make_plan(model, "all+core", rank=3, alpha=6.0))
    randomise(adapted)
    trained = {name: p.detach().clone() for name, p in adapted.trained_parameters().items()}
    sites = adapted.plan.sites
    merged = merge(adapted)
    for site in sites:
        if site.method == "core":
            change = trained[site.path]
        else:
            prefix = f"base_model.model.{site.path.removesuffix('.weight')}"
            a, b = (trained[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
            change = 2.0 * (b @ a)
        expected = (base[site.path].float() + change).bfloat16()
        found = merged.get_parameter(site.path).detach()
        assert found.dtype == torch.bfloat16
        # The product of two fp32 matrices may be summed in another order and tip a value over a rounding edge.
        assert float((found != expected).float().mean()) <= 1e-3, site.path
        assert float((found.float() - expected.float()).abs().max()) <= float(expected.abs().max()) * 2**-7


def test_packed_experts_of_a_bf16_base_are_rounded_once() -> None:
    """PEFT gives their change in the dtype of the base; the exact value is that of the same base held in fp32."""
    case = ("granite_hybrid", "moe")
    adapted, wide = (
        attach(model, make_plan(model, "all"))
        for model in (tiny_model(case, dtype=torch.bfloat16), tiny_model(case, dtype=torch.bfloat16).float())
    )
    randomise(adapted)
    with torch.no_grad():
        for name, parameter in wide.trained_parameters().items():
            parameter.copy_(adapted.trained_parameters()[name])
    expected = effective_tensors(wide)
    packed = [path for path, value in expected.items() if value.dim() == 3]
    assert packed
    found = effective_tensors(adapted)
    assert all(torch.equal(found[path], expected[path]) for path in packed)
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_effective_tensors_change_nothing() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core"))
    randomise(adapted)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    tensors = effective_tensors(adapted)
    assert set(tensors) == {site.path for site in adapted.plan.sites}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())


def test_untrained_adapter_merges_to_the_base_bitwise() -> None:
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "all+core"))
    merged = merge(adapted)
    for name, parameter in tiny_model(DENSE).named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


def test_discarded_core_is_not_merged(tmp_path: object) -> None:
    """The control throws its core away: merging gives what its saved adapter gives."""
    adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), "control:core-discarded"))
    randomise(adapted)
    adapted.save_pretrained(str(tmp_path))
    merged = merge(adapted)
    core = {c.path for c in tiny_inventory(DENSE).components if c.group == "core"}
    before = dict(tiny_model(DENSE).named_parameters())
    assert all(torch.equal(merged.get_parameter(path), before[path]) for path in core)
    tokens = tiny_tokens(DENSE, 1, 9)
    loaded = merge(load(tiny_model(DENSE), str(tmp_path)))
    assert torch.equal(logits_of(merged.eval(), tokens), logits_of(loaded.eval(), tokens))


@pytest.mark.parametrize("recipe", ["core", "control:core-in-place", "attention"])
def test_merge_is_bitwise_repeatable(recipe: str) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        adapted = attach(tiny_model(DENSE), make_plan(tiny_model(DENSE), recipe))
        randomise(adapted)
        results.append(merge(adapted).state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_survival_counts_what_rounding_leaves() -> None:
    """Planted: in one tensor a change far below a bf16 step, in another one far above it, in a third none."""
    adapted = attach(tiny_model(DENSE, dtype=torch.bfloat16), make_plan(tiny_model(DENSE), "core"))
    with torch.no_grad():
        for path, edit in adapted.edits.items():
            size = {"A_log": 1e-6, "D": 0.5, "dt_bias": 0.0}[path.rsplit(".", 1)[-1]]
            edit.trained()[""].fill_(size)
    by_role = {row["role"]: row for row in survival_by_role(survival_report(adapted))}
    assert by_role["ssm.A_log"]["changed"] == 1.0 and by_role["ssm.A_log"]["survives"] == 0.0
    assert by_role["ssm.D"]["changed"] == by_role["ssm.D"]["survives"] == 1.0
    assert by_role["ssm.dt_bias"]["changed"] == by_role["ssm.dt_bias"]["survives"] == 0.0
    assert by_role["ssm.D"]["max_abs_delta"] == pytest.approx(0.5, rel=1e-6)
    assert by_role["ssm.D"]["tensors"] == 2
