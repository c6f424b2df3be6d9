"""A sound adapter passes every check, and verifying it leaves no trace."""

from __future__ import annotations

import json
import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import Make, Run, make_base

from ssmtune.attach import AdaptedModel
from ssmtune.errors import AttachError, ConfigError, RecordError
from ssmtune.merge import merge
from ssmtune.records import digest, file_sha256, new_record, write_json
from ssmtune.verify import RECORD, RUN_RECORD, VerifyReport, verify
from ssmtune.verify.base import Check, CheckResult, check_names, get_check


def _state(adapted: AdaptedModel) -> dict[str, Any]:
    return {
        "values": {name: p.detach().clone() for name, p in adapted.named_parameters()},
        "flags": [p.requires_grad for p in adapted.parameters()],
        "modes": [module.training for module in adapted.modules()],
        "grads": [p.grad is None for p in adapted.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    assert torch.equal(before["torch"], after["torch"])
    for key in ("flags", "modes", "grads", "python"):
        assert before[key] == after[key], key


def test_a_trained_adapter_passes_every_check_and_is_left_bitwise_as_it_was(make: Make) -> None:
    adapted = make(dropout=0.1)
    before = _state(adapted)
    report = verify(adapted)
    _assert_same(before, _state(adapted))
    assert report.ok, {name: c for name, c in report.checks.items() if not c.ok}
    assert set(report.checks) == {name for name in check_names() if not get_check(name).needs_run}
    assert report.checks["reload"].measured == 0
    assert VerifyReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("recipe", ["adalora", "dora", "full", "prodial", "pissa"])
def test_other_methods_pass(make: Make, run: Run, same_process: None, recipe: str) -> None:
    adapted = make("all", init="pissa", scaling="rs") if recipe == "pissa" else make(recipe)
    for name in ("coverage", "frozen", "merge", "moved", "paths_agree", "peft_refuses", "reload"):
        result = run(name, adapted)
        assert result.ok, result


@pytest.mark.parametrize(
    ("config", "dtype"), [("odd", torch.float32), ("moe", torch.float32), ("dense", torch.bfloat16)]
)
def test_other_variants_pass(make: Make, run: Run, same_process: None, config: str, dtype: torch.dtype) -> None:
    adapted = make(config=config, dtype=dtype)
    # liveness of these variants is the methods' own contract; here the comparisons are what may be too tight.
    for name in set(check_names()) - {"resume", "liveness"}:
        assert run(name, adapted).ok, name


def test_a_bf16_model_keeps_its_own_tensors(make: Make) -> None:
    adapted = make("control:core-in-place", dtype=torch.bfloat16)
    before = _state(adapted)
    addresses = [p.data_ptr() for p in adapted.parameters()]
    assert verify(adapted, checks=["packing", "padding"]).ok
    _assert_same(before, _state(adapted))
    assert addresses == [p.data_ptr() for p in adapted.parameters()]


def test_an_untrained_adapter_is_not_called_trained(make: Make, run: Run, same_process: None) -> None:
    adapted = make(num_steps=0)
    assert not run("moved", adapted).ok
    result = run("reload", adapted)
    assert not result.ok and "equal the base" in result.detail


def test_a_check_that_raises_half_way_leaves_no_trace(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make(num_steps=1)
    before = _state(adapted)

    def run(subject: Any) -> CheckResult:
        with torch.no_grad():
            for p in subject.adapted.trained_parameters().values():
                p.add_(1)
        subject.adapted.eval()
        torch.rand(1)
        raise AttachError("stopped half way")

    monkeypatch.setattr(import_module("ssmtune.verify.moved"), "CHECK", Check(proves="", run=run))
    result = verify(adapted, checks=["moved"]).checks["moved"]
    assert not result.ok and result.detail == "stopped half way"
    _assert_same(before, _state(adapted))


def test_a_number_that_json_cannot_hold_survives_the_file() -> None:
    result = CheckResult(name="x", ok=False, measured=float("inf"), limit=0.0, where="", detail="")
    assert CheckResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


def test_wrong_requests_are_refused(make: Make, tmp_path: Path) -> None:
    adapted = make("attention", num_steps=0)
    with pytest.raises(ConfigError, match="'liveness'"):
        verify(adapted, checks=["livenes"])
    with pytest.raises(ConfigError, match="run directory"):
        verify(adapted, checks=["resume"])
    with pytest.raises(RecordError, match="no such record"):
        verify(tmp_path)
    merge(adapted)
    with pytest.raises(AttachError, match="merged"):
        verify(adapted)


@pytest.fixture
def run_dir(make: Make, tmp_path: Path) -> Path:
    """A run directory as `train` leaves it: a saved base, the adapter, one checkpoint, the record."""
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = str(tmp_path / "base")
    adapted = make(base=base)
    directory = tmp_path / "run"
    checkpoint = directory / "checkpoints" / "checkpoint-3"
    for target in (directory / "adapter", checkpoint):
        adapted.save_pretrained(target, step=3, run_id="r")
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).write_bytes(b"state")
    write_json(checkpoint / "trainer_state.json", {"global_step": 3})
    names = [path.name for path in checkpoint.iterdir()]
    write_json(checkpoint / "complete.json", {"sha256": {name: file_sha256(checkpoint / name) for name in names}})
    config = {"model": str(tmp_path / "base"), "dtype": "auto"}
    write_json(directory / RUN_RECORD, new_record("train", config=config, run_id=digest(config), restored_step=3))
    return directory


def test_a_run_is_verified_from_its_files_and_the_result_is_recorded(run_dir: Path) -> None:
    names = ["coverage", "frozen", "moved", "resume", "peft_refuses", "merge"]
    report = verify(run_dir, checks=names)
    assert report.ok, report
    assert "bit for bit" in report.checks["frozen"].detail
    assert json.loads((run_dir / RUN_RECORD).read_text())["verify"] == report.to_dict()
    record = json.loads((run_dir / RECORD).read_text())
    assert record["kind"] == "verify" and record["status"] == "done"
    assert VerifyReport.from_dict(record) == report


def test_a_damaged_checkpoint_is_named(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "checkpoint-3"
    (checkpoint / "optimizer.pt").write_bytes(b"other")
    result = verify(run_dir, checks=["resume"]).checks["resume"]
    assert not result.ok and result.where.endswith("checkpoint-3/optimizer.pt")
    assert json.loads((run_dir / RECORD).read_text())["status"] == "failed"
    (checkpoint / "scheduler.pt").unlink()
    result = verify(run_dir, checks=["resume"]).checks["resume"]
    assert result.measured == 2 and "scheduler.pt" in result.detail


def test_a_trainer_state_of_another_step_is_named(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "checkpoint-3"
    state = write_json(checkpoint / "trainer_state.json", {"global_step": 2})
    complete = json.loads((checkpoint / "complete.json").read_text())
    complete["sha256"]["trainer_state.json"] = file_sha256(state)
    write_json(checkpoint / "complete.json", complete)
    result = verify(run_dir, checks=["resume"]).checks["resume"]
    assert not result.ok and result.where.endswith("trainer_state.json") and "step 2" in result.detail


def test_a_run_that_did_not_finish_is_refused(run_dir: Path) -> None:
    record = json.loads((run_dir / RUN_RECORD).read_text())
    write_json(run_dir / RUN_RECORD, {**record, "status": "aborted"})
    with pytest.raises(RecordError, match="aborted"):
        verify(run_dir)
