"""Runs that are cut short: killed at any moment they end as if nothing had happened, and failures name what failed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from invariants.conftest import Runner
from invariants.micro import losses, micro_run, train_micro

from ssmtune import adapter_files, sft
from ssmtune.attach import load
from ssmtune.errors import TrainingFailed
from ssmtune.models import load_model
from ssmtune.records import read_record, write_json

STEPS = {"max_steps": 9, "num_evaluations": 3, "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.2}}
"""Saved at 3, 6 and 9; with dropout, so that a lost state of the random numbers shows."""


@pytest.fixture(scope="module")
def uninterrupted(
    run_child: Runner, micro_model: Path, micro_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The run that the others are compared with, and the events at which it can be killed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    answer = run_child(micro_run(micro_model, micro_data, output, **STEPS))
    assert answer["status"] == 0
    return {"output": output, "events": answer["events"]}


def assert_same_outcome(found: Path, expected: Path) -> None:
    """Adapter files byte for byte; histories equal in all but the speed."""
    for name in adapter_files.FILES:
        assert (found / "adapter" / name).read_bytes() == (expected / "adapter" / name).read_bytes(), name
    ours, theirs = read_record(found / "run.json"), read_record(expected / "run.json")
    assert ours["status"] == theirs["status"]
    assert losses(ours) == losses(theirs)
    for key in ("eval_history", "restored_step", "core", "survival"):
        assert ours[key] == theirs[key], key


def kill_points(events: list[str]) -> list[int]:
    """One event of each kind, from the middle of the run, and a few at random: most lie inside the saving."""
    kinds = [index for name in dict.fromkeys(events) for index in [[i for i, e in enumerate(events) if e == name]]]
    chosen = {indices[len(indices) // 2] for indices in kinds}
    return sorted(chosen | set(random.Random(0).sample(range(len(events)), 4)))


def test_events_cover_a_whole_save(uninterrupted: dict[str, Any]) -> None:
    """The planted deaths are only worth something if the run passes them."""
    events = uninterrupted["events"]
    assert events.count("step") == 9
    for name in (adapter_files.PEFT_TENSORS, adapter_files.OUR_TENSORS, adapter_files.OUR_CONFIG, "complete.json"):
        assert events.count(f"replace {name}") >= 3, name
    assert any(name.startswith("save optimizer") for name in events)
    assert "rmtree" in events


def test_killed_anywhere_and_resumed_equals_uninterrupted(
    run_child: Runner, uninterrupted: dict[str, Any], micro_model: Path, micro_data: Path, tmp_path: Path
) -> None:
    """SIGKILL at every kind of event, half-way through the write; the same command then finishes the run."""
    resumed = 0
    for kill_at in kill_points(uninterrupted["events"]):
        name = uninterrupted["events"][kill_at]
        settings = micro_run(micro_model, micro_data, tmp_path / f"{kill_at}", **STEPS)
        assert run_child(settings, kill_at)["status"] == -signal.SIGKILL, name
        again = run_child(settings)
        assert again["status"] == 0, (name, again)
        resumed += any("Continuing" in message for message in again["messages"])
        assert_same_outcome(tmp_path / f"{kill_at}", uninterrupted["output"])
    assert resumed >= 3, "hardly any run was continued from a checkpoint"


def test_cut_short_after_the_last_step_trains_no_other(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """The last checkpoint is there and the adapter is not; four steps end inside an epoch, which could go on."""
    settings = micro_run(micro_model, micro_data, tmp_path / "run")
    record = train_micro(settings)
    write_json(tmp_path / "run/run.json", record | {"status": "aborted"})
    adapter = (tmp_path / "run/adapter" / adapter_files.PEFT_TENSORS).read_bytes()
    shutil.rmtree(tmp_path / "run/adapter")
    assert losses(train_micro(settings)) == losses(record)
    assert (tmp_path / "run/adapter" / adapter_files.PEFT_TENSORS).read_bytes() == adapter


def test_killed_again_while_resuming(
    run_child: Runner, uninterrupted: dict[str, Any], micro_model: Path, micro_data: Path, tmp_path: Path
) -> None:
    events = uninterrupted["events"]
    settings = micro_run(micro_model, micro_data, tmp_path / "run", **STEPS)
    second_save = [i for i, name in enumerate(events) if name == "replace complete.json"][1]
    assert run_child(settings, second_save)["status"] == -signal.SIGKILL
    # The resumed process begins with its record, the removal of the half-saved checkpoint and three steps.
    assert run_child(settings, 4)["status"] == -signal.SIGKILL
    assert run_child(settings)["status"] == 0
    assert_same_outcome(tmp_path / "run", uninterrupted["output"])


def failing_from(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """Make the training loss `value` from optimiser step `step` on."""
    original = sft.EditTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss = original(self, model, inputs, *args, **options)
        return loss * value if model.training and self.state.global_step + 1 >= step else loss

    monkeypatch.setattr(sft.EditTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_non_finite_loss_stops_and_names_the_step(
    value: float, micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_from(monkeypatch, 5, value)
    settings = micro_run(micro_model, micro_data, tmp_path / "run", **STEPS)
    with pytest.raises(TrainingFailed, match=r"step 5: .*not finite.*checkpoints"):
        train_micro(settings)
    record = read_record(tmp_path / "run/run.json", kind="train")
    assert record["status"] == "failed" and "step 5" in record["error"]
    assert not (tmp_path / "run/adapter").exists()
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-3"
    adapted = load(load_model(str(micro_model)), checkpoint)
    assert all(bool(torch.isfinite(p).all()) for p in adapted.parameters())
    # With the cause gone, the same command continues from the checkpoint to the end of an uninterrupted run.
    monkeypatch.undo()
    assert [entry["step"] for entry in train_micro(settings)["history"]] == list(range(1, 10))


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_writing_an_adapter(
    micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = adapter_files.write_bytes

    def write_bytes(path: Path, payload: bytes) -> None:
        if "checkpoint-6" in str(path):
            no_space()
        original(path, payload)

    monkeypatch.setattr(adapter_files, "write_bytes", write_bytes)
    settings = micro_run(micro_model, micro_data, tmp_path / "run", **STEPS)
    with pytest.raises(TrainingFailed, match=r"no space left .* bytes free\).*again to continue"):
        train_micro(settings)
    assert read_record(tmp_path / "run/run.json")["status"] == "failed"
    monkeypatch.undo()
    messages: list[str] = []
    from ssmtune.config import decode
    from ssmtune.train import TrainConfig, train

    record = train(decode(TrainConfig, settings, where="test"), on_message=messages.append, progress=False)
    assert record["status"] in ("done", "provisional")
    assert any("checkpoint-6: incomplete" in message for message in messages)
    assert any("Continuing from" in message and "checkpoint-3" in message for message in messages)


def test_full_disk_while_torch_writes_the_optimizer(
    micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch answers a full disk with a RuntimeError of its archive writer; the user must hear of the disk."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a Linux device that is always full")
    original = torch.save

    def save(value: Any, target: Any, *args: Any, **options: Any) -> None:
        original(value, "/dev/full" if "optimizer" in str(target) else target, *args, **options)

    monkeypatch.setattr(torch, "save", save)
    # torch sees a full disk only through its own failed write, so the free space is reported as gone here.
    usage = type("Usage", (), {"total": 10**9, "used": 10**9, "free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    settings = micro_run(micro_model, micro_data, tmp_path / "run", **STEPS)
    with pytest.raises(TrainingFailed, match="no space left"):
        train_micro(settings)
    assert read_record(tmp_path / "run/run.json")["status"] == "failed"


def test_full_disk_while_saving_the_result(
    micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last write of a run can be the one that does not fit; the record must not say that the run goes on."""
    original = adapter_files.write_bytes

    def write_bytes(path: Path, payload: bytes) -> None:
        if path.parent.name == "adapter":
            no_space()
        original(path, payload)

    monkeypatch.setattr(adapter_files, "write_bytes", write_bytes)
    settings = micro_run(micro_model, micro_data, tmp_path / "run")
    with pytest.raises(TrainingFailed, match="no space left"):
        train_micro(settings)
    assert read_record(tmp_path / "run/run.json")["status"] == "failed"
    monkeypatch.undo()
    assert train_micro(settings)["status"] in ("done", "provisional")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB, where the test may mount one."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount_point)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_really_full_disk(small_disk: Path, micro_model: Path, micro_data: Path) -> None:
    """Whatever happens to be the write that does not fit, the run ends with the disk as its reason."""
    settings = micro_run(micro_model, micro_data, small_disk / "run", **STEPS, recipe="all+core")
    # Room for the record and part of one checkpoint.
    (small_disk / "ballast").write_bytes(b"x" * 360 * 1024)
    with pytest.raises(TrainingFailed, match="no space left"):
        train_micro(settings)
    (small_disk / "ballast").unlink()


def test_interrupt_is_recorded_as_aborted(
    micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sft.EditTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    monkeypatch.setattr(sft.EditTrainer, "compute_loss", compute_loss)
    settings = micro_run(micro_model, micro_data, tmp_path / "run", **STEPS)
    with pytest.raises(KeyboardInterrupt):
        train_micro(settings)
    assert read_record(tmp_path / "run/run.json")["status"] == "aborted"
    monkeypatch.undo()
    assert losses(train_micro(settings))[:4]
