"""SDT as one run of two stages: cut short anywhere it ends as if nothing had happened, and never chooses twice."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from invariants.conftest import Runner
from invariants.micro import byte_tokenizer, losses, micro_run, train_micro, trained_tensors
from transformers import MambaConfig, MambaForCausalLM

from ssmtune import adapter_files, selection, warmup
from ssmtune.errors import RecordError, TrainingFailed
from ssmtune.records import read_record
from ssmtune.verify import verify

NUM_WARM_UP, NUM_STEPS = 4, 4
EDITS = [
    {
        "method": "sdt",
        "select": ["allowed"],
        "options": {"selection": "warmup", "warmup_steps": NUM_WARM_UP, "channel_freeze_ratio": 0.9},
    },
    {"method": "lora", "select": ["ssm.out"], "options": {"rank": 2, "alpha": 2.0, "dropout": 0.2}},
]


@pytest.fixture(scope="module")
def micro_mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Mamba-1 of two layers, 32 channels and 4 states."""
    directory = tmp_path_factory.mktemp("micro-mamba")
    config = MambaConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = MambaForCausalLM(config)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def settings(model: Path, data: Path, output: Path, edits: Any = EDITS) -> dict[str, Any]:
    recipe = {"name": "sdt", "edits": edits}
    return micro_run(model, data, output, recipe=recipe, max_steps=NUM_STEPS, num_evaluations=2)


class Uninterrupted(NamedTuple):
    """The run that the others are compared with, and the events at which it can be killed."""

    output: Path
    events: list[str]


@pytest.fixture(scope="module")
def uninterrupted(
    run_child: Runner, micro_mamba: Path, micro_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Uninterrupted:
    output = tmp_path_factory.mktemp("sdt") / "run"
    answer = run_child(settings(micro_mamba, micro_data, output))
    assert answer["status"] == 0
    return Uninterrupted(output, answer["events"])


def entries(adapter: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in adapter_files.read(adapter).our_tensors.items() if k.endswith(".index")}


def without_times(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stages = [{k: v for k, v in stage.items() if k != "seconds"} for stage in stages]
    for stage in stages:
        stage["history"] = [{k: v for k, v in e.items() if k != "tokens_per_s"} for e in stage.get("history", [])]
    return stages


def assert_same_outcome(found: Path, expected: Path) -> None:
    for name in adapter_files.FILES:
        assert (found / "adapter" / name).read_bytes() == (expected / "adapter" / name).read_bytes(), name
    ours, theirs = read_record(found / "run.json"), read_record(expected / "run.json")
    assert losses(ours) == losses(theirs)
    assert without_times(ours["stages"]) == without_times(theirs["stages"])


def test_two_stages_are_recorded(uninterrupted: Uninterrupted) -> None:
    record = read_record(uninterrupted.output / "run.json", kind="train")
    warm_up, training = record["stages"]
    assert (warm_up["name"], warm_up["num_steps"]) == ("warm-up", NUM_WARM_UP)
    assert (training["name"], training["num_steps"]) == ("training", NUM_STEPS)
    assert len(warm_up["history"]) == NUM_WARM_UP and len(record["history"]) == NUM_STEPS
    # All of A [32, 4] and LoRA r 2 on out_proj [16, 32], in two layers; then 3 channels, 1 state, and B and C [4, 32].
    assert warm_up["trained"] == 2 * (32 * 4 + 2 * 48)
    assert warm_up["chosen"] == 2 * (3 * 1 + 2 * 4 * 3)
    assert record["plan"]["trainable"] == warm_up["chosen"] + 2 * 2 * 48
    # No decay of the learning rate in the warm-up, a cosine in training.
    assert len({entry["lr"] for entry in warm_up["history"]}) == 1
    assert record["history"][-1]["lr"] < record["history"][0]["lr"]


def test_the_choice_is_in_the_adapter_and_in_checkpoints(uninterrupted: Uninterrupted) -> None:
    chosen = entries(uninterrupted.output / "adapter")
    assert len(chosen) == 6
    for checkpoint in (uninterrupted.output / "checkpoints").glob("checkpoint-*"):
        assert all(torch.equal(index, chosen[key]) for key, index in entries(checkpoint).items())
    report = verify(uninterrupted.output)
    assert report.ok, {name: check.detail for name, check in report.checks.items() if not check.ok}


def test_training_starts_as_if_there_had_been_no_warm_up(
    run_child: Runner, uninterrupted: Uninterrupted, micro_mamba: Path, micro_data: Path, tmp_path: Path
) -> None:
    """Everything is put back: a run that is handed the selection trains the same weights from the same losses."""
    shutil.copytree(uninterrupted.output / "warmup", tmp_path / "run/warmup")
    assert run_child(settings(micro_mamba, micro_data, tmp_path / "run"))["status"] == 0
    assert_same_outcome(tmp_path / "run", uninterrupted.output)


def place(events: list[str], name: str, number: int) -> int:
    """Index of the event `name` that comes for the `number`-th time."""
    return [index for index, event in enumerate(events) if event == name][number]


@pytest.mark.parametrize(
    ("event", "number", "chosen"),
    [
        # The step after the warm-up's checkpoint; between its two files; the first and the last step of training.
        ("step", 3, False),
        ("replace stage.json", 0, False),
        ("step", NUM_WARM_UP, True),
        ("step", NUM_WARM_UP + 3, True),
    ],
    ids=["warm-up", "between the files", "first step", "training"],
)
def test_killed_in_either_stage_and_resumed_equals_uninterrupted(
    event: str,
    number: int,
    chosen: bool,
    run_child: Runner,
    uninterrupted: Uninterrupted,
    micro_mamba: Path,
    micro_data: Path,
    tmp_path: Path,
) -> None:
    given = settings(micro_mamba, micro_data, tmp_path / "run")
    killed = run_child(given, place(uninterrupted.events, event, number))
    assert killed["status"] == -signal.SIGKILL
    stage, selection_file = tmp_path / "run/warmup/stage.json", tmp_path / "run/warmup/selection.safetensors"
    assert stage.exists() == chosen and not (tmp_path / "run/adapter").exists()
    written = selection_file.stat().st_mtime_ns if selection_file.exists() else None
    assert run_child(given)["status"] == 0
    # What has been chosen is read back and not written again.
    assert (selection_file.stat().st_mtime_ns == written) == chosen
    assert_same_outcome(tmp_path / "run", uninterrupted.output)


def test_another_selection_is_refused(
    uninterrupted: Uninterrupted, micro_mamba: Path, micro_data: Path, tmp_path: Path
) -> None:
    """Damaged, or chosen for another plan: nothing is trained on it, and nothing is chosen anew in silence."""
    shutil.copytree(uninterrupted.output / "warmup", tmp_path / "damaged/warmup")
    path = tmp_path / "damaged/warmup/selection.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(RecordError, match="not the selection that stage.json vouches for.*to choose again"):
        train_micro(settings(micro_mamba, micro_data, tmp_path / "damaged"))
    shutil.copytree(uninterrupted.output / "warmup", tmp_path / "other/warmup")
    more = [{**EDITS[0], "options": {**EDITS[0]["options"], "channel_freeze_ratio": 0.8}}, EDITS[1]]  # type: ignore[dict-item]
    with pytest.raises(RecordError, match="of another plan or base"):
        train_micro(settings(micro_mamba, micro_data, tmp_path / "other", more))


def test_a_warm_up_that_does_not_move_a_is_named(micro_mamba: Path, micro_data: Path, tmp_path: Path) -> None:
    given = settings(micro_mamba, micro_data, tmp_path / "run")
    # So small a step that fp32 zero plus it is what Adam makes of it: planted by taking the change away again.
    with pytest.MonkeyPatch.context() as monkeypatch:
        original = selection.choose_after_warm_up

        def unmoved(plan: Any, edits: Any) -> Any:
            for edit in selection.sparse_edits(edits).values():
                if edit.dense is not None:
                    edit.dense.data.zero_()
            return original(plan, edits)

        monkeypatch.setattr(warmup, "choose_after_warm_up", unmoved)
        with pytest.raises(TrainingFailed, match="A_log: the warm-up did not move it"):
            train_micro(given)
    assert read_record(tmp_path / "run/run.json")["status"] == "failed"


def test_the_random_control_is_one_stage(micro_mamba: Path, micro_data: Path, tmp_path: Path) -> None:
    edits = [{**EDITS[0], "options": {"selection": "random", "seed": 4, "channel_freeze_ratio": 0.9}}, EDITS[1]]
    record = train_micro(settings(micro_mamba, micro_data, tmp_path / "run", edits))
    assert [stage["name"] for stage in record["stages"]] == ["training"]
    assert not (tmp_path / "run/warmup").exists()
    assert all(bool(v.any()) for k, v in trained_tensors(tmp_path / "run/adapter").items() if k.endswith(".delta"))
