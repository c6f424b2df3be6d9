"""The doctor measures every operation, and names a planted fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmtune import doctor, op_cases
from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.families.base import get_family
from ssmtune.ops.case import Case, named_outputs
from ssmtune.ops.mamba2_chunk_scan import cases as mamba2_cases
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan
from ssmtune.tasks.base import Task, get_task, task_names
from ssmtune.verify.base import CheckResult


def _scan_errors(function: Any, label: str) -> dict[str, float]:
    case = next(case for case in mamba2_cases.cases() if case.label.startswith(label))
    wrong = Case(
        operation=case.operation,
        label=case.label,
        function=named_outputs(function, mamba2_cases.OPTIONS),
        truth=case.truth,
        inputs=case.inputs,
    )
    return op_cases.case_errors(wrong, torch.float32, torch.device("cpu"))


def test_every_operation_and_scorer_is_right_here() -> None:
    report = doctor.examine("cpu")
    assert report.ok, report.lines()
    scorers = {name for name in report.checks if name.startswith("scorer/")}
    assert scorers == {f"scorer/{name}" for name in SCORED} and report.untried == ()
    names = {name.partition("/")[0] for name in set(report.checks) - scorers}
    assert names == {
        *("causal_conv1d", "causal_conv1d_update", "mamba1_selective_scan", "mamba1_state_update"),
        *("mamba2_chunk_scan", "selective_state_update", "rg_lru", "rwkv_wkv", "mlstm", "gated_rms_norm"),
        *("projection", "gated_mlp", "linear_cross_entropy", "mamba2_conv_scan", "mamba2_mixer"),
        *("gated_delta_rule", "gated_delta_rule_update", "gated_delta_rule_kda", "gated_delta_rule_kda_update"),
    }
    assert {name.partition("/")[2] for name in set(report.checks) - scorers} == {"float32", "bfloat16"}
    assert report.versions["torch"] and report.device == "cpu"
    assert [CheckResult.from_dict(c) for c in report.to_dict()["checks"]] == list(report.checks.values())


@pytest.mark.parametrize(("lost", "label"), [("seq_idx", "packed"), ("padding_mask", "continued and padded")])
def test_an_operation_that_ignores_an_argument_is_found(lost: str, label: str) -> None:
    """padding_mask: a pad that decays erodes the state that was handed in."""
    errors = _scan_errors(lambda **kwargs: mamba2_chunk_scan(**{**kwargs, lost: None}), label)
    assert errors["output"] > 100 * doctor.LIMITS[torch.float32]
    assert errors["gradient of B_BTGN"] > 100 * doctor.LIMITS[torch.float32]


def test_a_wrong_gradient_under_a_right_forward_is_found() -> None:
    def halved(*, A_H: Any, **kwargs: Any) -> Any:
        return mamba2_chunk_scan(A_H=A_H.detach() + 0.5 * (A_H - A_H.detach()), **kwargs)

    errors = _scan_errors(halved, "plain, 63")
    assert errors["output"] < doctor.LIMITS[torch.float32]
    assert errors["gradient of A_H"] == pytest.approx(0.5, rel=1e-3)


def test_a_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        y, state = mamba2_chunk_scan(*args, **kwargs)
        return y * torch.where(torch.arange(y.shape[1]) == 0, torch.nan, 1.0)[:, None, None], state

    monkeypatch.setattr(mamba2_cases, "mamba2_chunk_scan", poisoned)
    monkeypatch.setattr(doctor, "all_cases", mamba2_cases.cases)
    result = doctor.examine("cpu").checks["mamba2_chunk_scan/float32"]
    assert not result.ok and result.measured == float("inf") and "output" in result.where


SCORED = [name for name in task_names() if get_task(name).metrics]


@pytest.mark.parametrize("name", SCORED)
def test_a_scorer_without_a_stop_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a published study scored: everything that the model wrote until its tokens ran out."""
    assert doctor.scorer_check(name, get_task(name)).ok
    for module in ("classification", "_answers", "_sourced", "_sequences"):
        monkeypatch.setattr(f"ssmtune.tasks.{module}.stop_text", lambda completion, stops=(): completion)
    result = doctor.scorer_check(name, get_task(name))
    # Likeness of texts falls by a part, a right answer becomes wrong as a whole.
    graded = get_task(name).kind in ("text", "summary") or name in ("narrativeqa", "spider")
    assert not result.ok and (result.measured > 0.4 if graded else result.measured == 1)
    assert any(stop in result.where for stop in get_task(name).stops)


def test_a_scorer_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, task: Task) -> CheckResult:
        raise MissingDependency("ROUGE needs the package rouge-score")

    monkeypatch.setattr(doctor, "all_cases", list)
    monkeypatch.setattr(doctor, "scorer_check", absent)
    report = doctor.examine("cpu")
    assert len(report.untried) == len(SCORED) and report.checks == {}
    assert "not tried: scorer/xsum: ROUGE needs the package rouge-score" in report.lines()


def test_known_bad_pairs_are_told_by_gpu_and_version() -> None:
    pair = next(pair for pair in doctor.KNOWN_BAD if pair.package == "triton")
    assert pair.applies(9, {"triton": (3, 6, 0)}) and pair.applies(9, {"triton": (3, 7, 0)})
    assert not pair.applies(9, {"triton": (3, 7, 1)}) and not pair.applies(9, {"triton": (3, 3, 1)})
    assert not pair.applies(8, {"triton": (3, 6, 0)}) and not pair.applies(9, {})


def test_an_absent_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no GPU"):
        doctor.examine("cuda")


def test_leak_test_shows_stock_and_ours_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(get_family("granite_hybrid").tiny_configs()["dense"]).train()
    before = torch.get_rng_state()
    result = doctor.leak_test(model)
    assert result.ok and "runs it leaks" in result.detail
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert not any("forward" in vars(module) for module in model.modules())
    llama = AutoModelForCausalLM.from_config(get_family("llama").tiny_configs()["dense"])
    assert "keeps packed documents apart" in doctor.leak_test(llama).detail


def test_operations_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where compiling takes long; an operation that takes its process along has failed, and no other."""
    names = ["gated_rms_norm/float32", "projection/float32", "no_such_operation/float32"]
    monkeypatch.setattr(doctor, "MAX_PROCESSES", 2)
    found = {check.name: check for check in doctor._measure_apart(names, "cpu")}
    assert list(found) == names
    assert [check.ok for check in found.values()] == [True, True, False]
    assert [found[names[0]]] == list(doctor.measure_operations(names[:1], "cpu"))
    assert "its process ended with 1: IndexError" in found[names[2]].where
