"""Equivalence classes of training, through the `train` stage, on a micro model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from invariants.micro import losses, micro_run, train_micro, trained_tensors
from peft import PeftModel
from tolerances import RUN_LOSS, RUN_WEIGHTS_MEAN
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils

from ssmtune import adapter_files
from ssmtune.attach import load
from ssmtune.data import load_pairs
from ssmtune.errors import AdapterMismatch, ConfigError
from ssmtune.models import load_model, load_tokenizer
from ssmtune.records import read_record
from ssmtune.training_data import DataConfig, prepare_data


@contextmanager
def spied_steps() -> Iterator[list[list[dict[str, Any]]]]:
    """Record, at every AdamW step, each group's settings, gradients and values before and after the step."""
    steps: list[list[dict[str, Any]]] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **options: Any) -> Any:
        groups = [
            {
                "name": group["name"],
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "gradients": [p.grad.clone() for p in group["params"]],
                "before": [p.detach().clone() for p in group["params"]],
            }
            for group in self.param_groups
        ]
        result = original(self, *args, **options)
        for group, facts in zip(self.param_groups, groups, strict=True):
            facts["after"] = [p.detach().clone() for p in group["params"]]
        steps.append(groups)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        yield steps


def assert_equal_runs(first: dict[str, Any], second: dict[str, Any], first_dir: Path, second_dir: Path) -> None:
    """Same losses and same final weights: compared in maximum and in mean, so that a one-sided drift shows."""
    assert len(losses(first)) == len(losses(second)) > 0
    for a, b in zip(losses(first), losses(second), strict=True):
        assert a == pytest.approx(b, rel=RUN_LOSS)
    ours, theirs = trained_tensors(first_dir / "adapter"), trained_tensors(second_dir / "adapter")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        difference = (value - theirs[name]).abs()
        assert float(difference.mean()) <= RUN_WEIGHTS_MEAN * float(value.abs().mean()), name


def num_rows(model: Path, data: Path, **options: Any) -> int:
    config = DataConfig(
        train_file=str(data / "train.jsonl"), validation_file=str(data / "validation.jsonl"), max_length=160, **options
    )
    return len(prepare_data(config, load_tokenizer(str(model))).train)


def test_accumulation_is_a_bigger_batch(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    options = {"data": {"packing": False}}
    whole = train_micro(micro_run(micro_model, micro_data, tmp_path / "whole", rows_per_step=4, **options))
    split = train_micro(
        micro_run(micro_model, micro_data, tmp_path / "split", rows_per_step=2, num_accumulated=2, **options)
    )
    assert_equal_runs(whole, split, tmp_path / "whole", tmp_path / "split")


def test_packed_is_padded_is_alone(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """All documents in every step: in packed rows, in padded rows, and one row of one document at a time."""
    num_packed, num_documents = num_rows(micro_model, micro_data), num_rows(micro_model, micro_data, packing=False)
    assert num_packed < num_documents == 20
    records = {
        name: train_micro(micro_run(micro_model, micro_data, tmp_path / name, **options))
        for name, options in {
            "packed": {"rows_per_step": num_packed},
            "padded": {"rows_per_step": num_documents, "data": {"packing": False}},
            "alone": {"rows_per_step": 1, "num_accumulated": num_documents, "data": {"packing": False}},
        }.items()
    }
    assert_equal_runs(records["packed"], records["padded"], tmp_path / "packed", tmp_path / "padded")
    assert_equal_runs(records["packed"], records["alone"], tmp_path / "packed", tmp_path / "alone")


def test_validation_loss_does_not_depend_on_packing(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """Packed or not, in one batch or several, the loss that selects the best checkpoint is the same."""
    found = {}
    for name, options in {
        "packed": {"rows_per_step": 4},
        "padded": {"rows_per_step": 4, "data": {"packing": False}},
        "single": {"rows_per_step": 1, "data": {"packing": False}},
    }.items():
        # A learning rate of (nearly) nothing: the same model is validated.
        frozen = {"learning_rate": 1e-12, "core_learning_rate": 1e-12}
        record = train_micro(
            micro_run(micro_model, micro_data, tmp_path / name, max_steps=1, optimizer=frozen, **options)
        )
        found[name] = record["eval_history"][-1]["eval_loss"]
    assert found["padded"] == pytest.approx(found["packed"], rel=RUN_LOSS)
    assert found["single"] == pytest.approx(found["packed"], rel=RUN_LOSS)


def test_first_loss_is_the_cross_entropy_of_the_answers(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """By hand: the plain model, one document at a time, summed over the answers' tokens and divided by their number."""
    rows = num_rows(micro_model, micro_data)
    record = train_micro(micro_run(micro_model, micro_data, tmp_path / "run", rows_per_step=rows, max_steps=1))
    model = AutoModelForCausalLM.from_pretrained(micro_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    total, num = 0.0, 0
    for pair in load_pairs(micro_data / "train.jsonl"):
        prompt = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True, tokenize=False)
        answer = pair.completion[0]["content"] + tokenizer.eos_token
        num_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        log_probabilities = F.log_softmax(logits.double(), dim=-1)
        for t in range(num_prompt, ids.shape[1]):
            total -= float(log_probabilities[t - 1, ids[0, t]])
            num += 1
    assert record["history"][0]["loss"] == pytest.approx(total / num, rel=RUN_LOSS)


@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_clipping_is_what_the_config_says(clip: str, micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    norm = 1e-3

    def gradients(**optimizer: Any) -> dict[str, list[torch.Tensor]]:
        output = tmp_path / f"{optimizer['clip_norm']}"
        with spied_steps() as steps:
            train_micro(micro_run(micro_model, micro_data, output, max_steps=1, optimizer=optimizer))
        return {group["name"]: group["gradients"] for group in steps[0]}

    raw = gradients(clip=clip, clip_norm=1e6)
    clipped = gradients(clip=clip, clip_norm=norm)
    assert set(raw) == {"lora", "core"}
    norms = {name: math.sqrt(sum(float(g.double().pow(2).sum()) for g in group)) for name, group in raw.items()}
    assert min(norms.values()) > norm, "nothing is clipped, so nothing is compared"
    joint = math.sqrt(sum(value**2 for value in norms.values()))
    for name, group in raw.items():
        factor = norm / (joint if clip == "joint" else norms[name])
        for gradient, found in zip(group, clipped[name], strict=True):
            # One multiplication by a factor computed in fp32: a few units in the last place.
            torch.testing.assert_close(found, gradient * factor, rtol=1e-5, atol=0.0)


def test_gradients_below_the_norm_are_left_alone(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """Each group is judged by its own norm: with the limit between the two, only the larger one is scaled."""
    base = micro_run(micro_model, micro_data, tmp_path / "raw", max_steps=1, optimizer={"clip_norm": 1e6})
    with spied_steps() as raw_steps:
        record = train_micro(base)
    norms = record["history"][0]["grad_norm"]
    small, large = sorted(norms, key=norms.__getitem__)
    limit = (norms[small] * norms[large]) ** 0.5
    with spied_steps() as steps:
        train_micro(
            micro_run(micro_model, micro_data, tmp_path / "clipped", max_steps=1, optimizer={"clip_norm": limit})
        )
    raw = {group["name"]: group["gradients"] for group in raw_steps[0]}
    found = {group["name"]: group["gradients"] for group in steps[0]}
    assert all(torch.equal(a, b) for a, b in zip(raw[small], found[small], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(raw[large], found[large], strict=True) if bool(a.any()))


def test_core_has_its_own_learning_rate_and_no_decay(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "core_learning_rate": 7e-3, "weight_decay": 0.5, "clip_norm": 1e6}
    with spied_steps() as steps:
        train_micro(micro_run(micro_model, micro_data, tmp_path / "run", max_steps=2, optimizer=optimizer))
    groups = {group["name"]: group for group in steps[0]}
    assert (groups["lora"]["lr"], groups["lora"]["weight_decay"]) == (1e-3, 0.5)
    assert (groups["core"]["lr"], groups["core"]["weight_decay"]) == (7e-3, 0.0)
    # By hand: the first AdamW step is lr * sign(g) (up to eps), after a decay of lr * weight_decay.
    for name, group in groups.items():
        for gradient, before, after in zip(group["gradients"], group["before"], group["after"], strict=True):
            moved = gradient.abs() > 1e-4  # far above AdamW's eps of 1e-8
            expected = before * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * gradient.sign()
            # 1e-4: eps / |g| at most; the rest is fp32 rounding.
            assert torch.allclose(after[moved], expected[moved], rtol=1e-4, atol=1e-4 * group["lr"]), name


def test_second_step_of_a_cosine_is_half_way_down(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    with spied_steps() as steps:
        train_micro(micro_run(micro_model, micro_data, tmp_path / "run", max_steps=2))
    first, second = ({group["name"]: group["lr"] for group in step} for step in steps)
    for name, value in first.items():
        assert second[name] == pytest.approx(value / 2)


def test_equal_seeds_give_equal_runs(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """Bitwise, dropout included; and another seed gives another run."""
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.3}
    first, second, other = (
        train_micro(micro_run(micro_model, micro_data, tmp_path / name, lora=lora, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert losses(first) == losses(second) != losses(other)
    for name in adapter_files.FILES:
        assert (tmp_path / "a/adapter" / name).read_bytes() == (tmp_path / "b/adapter" / name).read_bytes(), name


@pytest.mark.parametrize("recipe", ["all+core", "hankel"])
def test_checkpointing_changes_nothing(
    recipe: str, micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_micro(micro_run(micro_model, micro_data, tmp_path / "plain", recipe=recipe))
    calls: list[int] = []
    original = modeling_utils.checkpoint

    def checkpoint(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(modeling_utils, "checkpoint", checkpoint)
    settings = micro_run(micro_model, micro_data, tmp_path / "saved", recipe=recipe, memory="small")
    checkpointed = train_micro(settings)
    assert len(calls) == 4 * 2, "four steps of two layers"
    assert losses(plain) == losses(checkpointed)
    ours, theirs = trained_tensors(tmp_path / "plain/adapter"), trained_tensors(tmp_path / "saved/adapter")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    opened = [entry["mean_abs"] for entry in checkpointed["gates"]]
    assert len(opened) == (2 if recipe == "hankel" else 0) and all(size > 0 for size in opened)


def test_training_lowers_the_loss(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    options = {"max_steps": 30, "rows_per_step": 4, "optimizer": {"learning_rate": 2e-2}}
    record = train_micro(micro_run(micro_model, micro_data, tmp_path / "run", **options))
    assert losses(record)[-1] < 0.8 * losses(record)[0]


def test_best_checkpoint_is_restored_as_a_whole(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """Validated on answers that training makes ever less likely, the best step is an early one: both halves of it."""
    contrary = tmp_path / "contrary.jsonl"
    contrary.write_text('{"instruction": "ab jk", "output": "QQQQQQQQ"}\n' * 4)
    settings = micro_run(
        micro_model,
        micro_data,
        tmp_path / "run",
        max_steps=12,
        num_evaluations=6,
        data={"validation_file": str(contrary)},
        optimizer={"learning_rate": 0.03, "core_learning_rate": 0.03},
    )
    record = train_micro(settings)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in record["eval_history"]}
    best = min(evaluated, key=evaluated.__getitem__)
    assert list(evaluated) == [2, 4, 6, 8, 10, 12]
    assert best != 12, "the last step is the best, so nothing is restored"
    assert record["restored_step"] == best
    saved = adapter_files.read(tmp_path / "run/adapter")
    checkpoint = adapter_files.read(tmp_path / f"run/checkpoints/checkpoint-{best}")
    last = adapter_files.read(tmp_path / "run/checkpoints/checkpoint-12")
    assert saved.step == checkpoint.step == best and last.step == 12
    assert saved.our_tensors and saved.peft_tensors
    for ours, theirs, later in (
        (saved.our_tensors, checkpoint.our_tensors, last.our_tensors),
        (saved.peft_tensors, checkpoint.peft_tensors, last.peft_tensors),
    ):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert not all(torch.equal(value, later[name]) for name, value in ours.items())
    # Halves of two steps are refused, whichever way they are mixed.
    for name in (adapter_files.PEFT_TENSORS, adapter_files.OUR_TENSORS):
        kept = (tmp_path / "run/adapter" / name).read_bytes()
        (tmp_path / "run/adapter" / name).write_bytes((tmp_path / "run/checkpoints/checkpoint-12" / name).read_bytes())
        with pytest.raises(AdapterMismatch, match="different steps"):
            adapter_files.read(tmp_path / "run/adapter")
        (tmp_path / "run/adapter" / name).write_bytes(kept)


def test_discarded_core_leaves_the_factors_of_the_full_method(
    micro_model: Path, micro_data: Path, tmp_path: Path
) -> None:
    """The control trains what the full method trains, keeps the core in checkpoints, and saves a plain PEFT adapter."""
    full = train_micro(micro_run(micro_model, micro_data, tmp_path / "full"))
    control = train_micro(micro_run(micro_model, micro_data, tmp_path / "control", recipe="control:core-discarded"))
    assert losses(full) == losses(control)
    saved_full = adapter_files.read(tmp_path / "full/adapter")
    saved_control = adapter_files.read(tmp_path / "control/adapter")
    assert saved_full.our_tensors and not saved_control.our_tensors
    assert saved_full.peft_tensors.keys() == saved_control.peft_tensors.keys()
    for name, value in saved_full.peft_tensors.items():
        assert torch.equal(value, saved_control.peft_tensors[name]), name
    (checkpoint,) = (tmp_path / "control/checkpoints").glob("checkpoint-*")
    kept = adapter_files.read(checkpoint).our_tensors
    assert kept.keys() == saved_full.our_tensors.keys()
    assert all(torch.equal(value, saved_full.our_tensors[name]) for name, value in kept.items())
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(micro_model), tmp_path / "control/adapter")
    loaded = load(load_model(str(micro_model)), tmp_path / "control/adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        ours, theirs = loaded(input_ids=ids).logits, stock.eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=RUN_LOSS, atol=RUN_LOSS)


def test_record_tells_what_happened(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    settings = micro_run(micro_model, micro_data, tmp_path / "run")
    record = train_micro(settings)
    assert read_record(tmp_path / "run/run.json", kind="train") == record
    assert record["status"] in ("done", "provisional")
    assert record["plan"]["trainable"] == sum(record["plan"]["groups"].values())
    assert [entry["step"] for entry in record["history"]] == [1, 2, 3, 4]
    assert all(entry["tokens_per_s"] > 0 and set(entry["grad_norm"]) == {"lora", "core"} for entry in record["history"])
    assert {entry["tensor"] for entry in record["core"]} == {"A_log", "D", "dt_bias"}
    assert all(entry["moved"] > 0 for entry in record["core"])
    # A finished run is returned as it is; another config in its place is refused, naming what differs.
    assert train_micro(settings) == record
    with pytest.raises(ConfigError, match=r"another config \(differs in seed\)"):
        train_micro(settings | {"seed": 7})


def test_a_rate_that_would_kill_states_is_held_back(micro_model: Path, micro_data: Path, tmp_path: Path) -> None:
    """Steps of 20 in A_log would end at decays of e^20 a token; the guard acts after every one of them, and says so."""
    optimizer = {"core_learning_rate": 20.0}
    recipe = {"name": "decays", "edits": [{"method": "core", "select": ["ssm.A_log"]}]}
    record = train_micro(micro_run(micro_model, micro_data, tmp_path / "run", recipe=recipe, optimizer=optimizer))
    assert record["core_held"] > 0
    deltas = {name: v for name, v in trained_tensors(tmp_path / "run/adapter").items() if name.endswith("A_log")}
    assert deltas and all(float(value.abs().max()) < 20 for value in deltas.values())
