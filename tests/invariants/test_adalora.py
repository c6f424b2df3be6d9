"""AdaLoRA in training: the budget of triplets, the penalty, and runs that are cut short between two allocations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from invariants.micro import losses, micro_run, train_micro
from tolerances import LOGITS_FP32, RUN_LOSS

from ssmtune import adapter_files, schedules
from ssmtune.attach import attach, load
from ssmtune.merge import effective_tensors, merge
from ssmtune.methods._adaptive import Adaptive
from ssmtune.methods.adalora import AdaloraOptions
from ssmtune.models import load_model
from ssmtune.placement import named_recipe
from ssmtune.plan import make_plan
from ssmtune.records import read_record
from ssmtune.verify import verify

OPTIONS = {"rank": 3, "target_rank": 2, "alpha": 6.0, "interval": 3, "initial_share": 0.125, "final_share": 0.25}
NUM_STEPS, LAST = 8, 6
"""Allocations after steps 3 and 6, checkpoints after every other step; then the ranks are held."""
SELECT = ["ssm.in.x", "ssm.out", "attention"]


def settings(model: Path, data: Path, output: Path, *, gamma: float = 0.1, **changes: Any) -> dict[str, Any]:
    edit = {"method": "adalora", "select": SELECT, "options": {**OPTIONS, "gamma": gamma}}
    given = {"max_steps": NUM_STEPS, "num_evaluations": 4} | changes
    return micro_run(model, data, output, recipe={"name": "adalora", "edits": [edit]}, **given)


class Uninterrupted(NamedTuple):
    """The run that the others are compared with, and the number of triplets that act after each step it was told of."""

    output: Path
    told: list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def whole(micro_model: Path, micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    output, told = tmp_path_factory.mktemp("adalora") / "run", []
    original = schedules.Schedules.after_step

    def noted(self: Any, step: int, num_steps: int) -> None:
        original(self, step, num_steps)
        told.append((step, num_steps, sum(edit.rank for edits in self.groups.values() for edit in edits)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules.Schedules, "after_step", noted)
        train_micro(settings(micro_model, micro_data, output))
    return Uninterrupted(output, told)


@pytest.fixture
def uninterrupted(whole: Uninterrupted) -> Path:
    return whole.output


def test_steps_are_counted_from_one_and_ranks_fall_when_due(whole: Uninterrupted) -> None:
    """Allocations after steps 3 and 6 of 8; what a gradient brings back in between is gone at the last and after it."""
    num_sites = len(adapter_files.read(whole.output / "adapter").plan.sites)
    assert [(step, num) for step, num, _ in whole.told] == [(step, NUM_STEPS) for step in range(1, NUM_STEPS + 1)]
    ranks = [rank for _, _, rank in whole.told]
    full, target = 3 * num_sites, 2 * num_sites
    # After step 3: 2 + (1 - 2 / 5)^3 triplets a site.
    assert ranks == [full, full, round(num_sites * 2.216), full, full, target, target, target]


def ranks_of(directory: Path) -> list[int]:
    tensors = adapter_files.read(directory).our_tensors
    return [int(value.count_nonzero()) for name, value in tensors.items() if name.endswith(".lora_lambda")]


def test_the_last_checkpoint_has_the_target_and_the_record_the_ranks(uninterrupted: Path) -> None:
    ranks = ranks_of(uninterrupted / f"checkpoints/checkpoint-{NUM_STEPS}")
    assert sum(ranks) == OPTIONS["target_rank"] * len(ranks) and len(set(ranks)) > 1
    record = read_record(uninterrupted / "run.json")
    reported = record["ranks"]
    assert sorted(entry["rank"] for entry in reported) == sorted(ranks_of(uninterrupted / "adapter"))
    assert {entry["initial"] for entry in reported} == {OPTIONS["rank"]} and {"attn.q"} < {e["role"] for e in reported}
    report = verify(uninterrupted, checks=["liveness", "merge", "moved", "resume"])
    assert report.ok, {name: check.detail for name, check in report.checks.items() if not check.ok}


def test_a_site_without_a_triplet_is_pruned_and_a_model_without_one_is_not_trained(
    uninterrupted: Path, micro_model: Path
) -> None:
    adapted = load(load_model(str(micro_model)), uninterrupted / "adapter")
    edits: list[Any] = list(adapted.edits.values())
    # Every tensor has one site here; the last is attention's.
    edits[-1].lora_lambda.data.zero_()
    num_pruned = sum(edit.rank == 0 for edit in edits)
    moved = verify(adapted, checks=["moved"]).checks["moved"]
    assert moved.ok and f"{num_pruned} more are pruned to rank 0" in moved.detail
    for edit in edits:
        edit.lora_lambda.data.zero_()
    assert not verify(adapted, checks=["moved"]).checks["moved"].ok


def test_the_adapter_is_without_what_only_training_needs(uninterrupted: Path) -> None:
    adapter = adapter_files.read(uninterrupted / "adapter")
    assert {name.rpartition(".")[2] for name in adapter.our_tensors} == {"lora_P", "lora_lambda", "lora_Q"}
    assert sum(value.numel() for value in adapter.our_tensors.values()) == adapter.plan.trainable
    checkpoint = adapter_files.read(uninterrupted / f"checkpoints/checkpoint-{NUM_STEPS}")
    assert {"kept", "sensitivity_P", "uncertainty_lambda"} < {n.rpartition(".")[2] for n in checkpoint.our_tensors}


def test_pruned_triplets_are_in_no_merged_weight(uninterrupted: Path, micro_model: Path) -> None:
    """The merged weights are those of the active triplets alone, by hand; what the others hold does not matter."""
    directory = uninterrupted / f"checkpoints/checkpoint-{NUM_STEPS}"
    base = dict(load_model(str(micro_model)).named_parameters())
    adapted = load(load_model(str(micro_model)), directory)
    expected, num_pruned = {}, 0
    for site in adapted.plan.sites:
        edit: Any = adapted.edits[site.key]
        active = edit.kept.bool()
        num_pruned += int((~active).sum())
        with torch.no_grad():
            edit.lora_P[:, ~active] = 5.0
        P, scales, Q = (p.detach().double() for p in edit.trained().values())
        value = expected.get(site.path, base[site.path].detach().double().clone())
        first, end = site.rows[0] if site.rows else (0, len(value))
        value[first:end] += 2.0 * (P[:, active] * scales[active]) @ Q[active]
        expected[site.path] = value
    assert num_pruned == len(adapted.plan.sites)
    merged = dict(merge(adapted).named_parameters())
    for path, value in expected.items():
        assert torch.allclose(merged[path].detach().double(), value, rtol=0, atol=LOGITS_FP32), path


@pytest.mark.parametrize("step", [5, 7], ids=["between two allocations", "ranks held"])
def test_resumed_equals_uninterrupted(
    step: int, uninterrupted: Path, micro_model: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the averages before an allocation, and the triplets that are kept after the last."""
    given = settings(micro_model, micro_data, tmp_path / "run")
    original = schedules.Schedules.after_step

    def stopped(self: Any, now: int, num_steps: int) -> None:
        if now == step:
            raise KeyboardInterrupt
        original(self, now, num_steps)

    with monkeypatch.context() as patch:
        patch.setattr(schedules.Schedules, "after_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_micro(given)
    assert (tmp_path / f"run/checkpoints/checkpoint-{step - 1}").exists() and not (tmp_path / "run/adapter").exists()
    record, expected = train_micro(given), read_record(uninterrupted / "run.json")
    assert losses(record) == losses(expected)
    assert (record["eval_history"], record["ranks"]) == (expected["eval_history"], expected["ranks"])
    for directory in ("adapter", f"checkpoints/checkpoint-{NUM_STEPS}"):
        for name in (adapter_files.PEFT_TENSORS, adapter_files.OUR_TENSORS):
            found, there = tmp_path / "run" / directory / name, uninterrupted / directory / name
            assert found.read_bytes() == there.read_bytes(), f"{directory}/{name}"


def test_penalty_is_in_the_training_loss_once_and_in_no_evaluation(
    micro_model: Path, micro_data: Path, tmp_path: Path
) -> None:
    """gamma times the mean over the sites of eq. 4, by hand in fp64; two accumulated batches have it once."""
    still = {"max_steps": 1, "num_evaluations": 1, "optimizer": {"learning_rate": 1e-12}}
    without, once, split = (
        train_micro(settings(micro_model, micro_data, tmp_path / name, gamma=gamma, **still, **rows))
        for name, gamma, rows in (
            ("without", 0.0, {}),
            ("once", 0.7, {}),
            ("split", 0.7, {"rows_per_step": 1, "num_accumulated": 2}),
        )
    )
    start = adapter_files.read(tmp_path / "once/adapter")
    total = 0.0
    for site in start.plan.sites:
        P, Q = (start.our_tensors[f"{site.key}.lora_{letter}"].double() for letter in "PQ")
        for gram in (P.T @ P, Q @ Q.T):
            total += sum((float(gram[i, j]) - (i == j)) ** 2 for i in range(len(gram)) for j in range(len(gram)))
    expected = 0.7 * total / len(start.plan.sites)
    assert expected > 0.1
    assert losses(once)[0] - losses(without)[0] == pytest.approx(expected, rel=10 * RUN_LOSS)
    assert losses(split)[0] == pytest.approx(losses(once)[0], rel=RUN_LOSS)
    assert once["eval_history"] == without["eval_history"]


def test_budget_by_hand() -> None:
    """Full up to the first bound, a cubic in between, the target from the second; 30 to 10 over steps 2 to 6 of 10."""
    options = AdaloraOptions(rank=3, target_rank=1, initial_share=0.2, final_share=0.4)
    found = [options.budget(10, step, 10) for step in range(1, 11)]
    # 10 + 20 (3/4)^3 = 18.4, 10 + 20 / 8 = 12.5 (to even), 10 + 20 / 64 = 10.3
    assert found == [30, 30, 18, 12, 10, 10, 10, 10, 10, 10]
    # Bounds that meet, or that would leave no step, in runs of two steps and of one.
    short = AdaloraOptions(rank=3, target_rank=1, initial_share=0.3, final_share=0.6)
    assert [(short.span(num), short.budget(10, short.span(num)[1], num)) for num in (2, 1)] == [
        ((1, 1), 10),
        ((0, 1), 10),
    ]


def test_allocation_is_algorithm_1_by_hand() -> None:
    """Two edits, random gradients: lambda after every step from loops over single numbers in fp64."""
    torch.manual_seed(0)
    options = AdaloraOptions(
        rank=3, target_rank=1, beta1=0.6, beta2=0.7, interval=2, initial_share=0.1, final_share=0.3
    )
    edits = [Adaptive(torch.randn(5, 4), None, options), Adaptive(torch.randn(6, 7), ((1, 4),), options)]
    smoothed: dict[tuple[int, str, int], tuple[float, float]] = {}
    pruned: set[tuple[int, int]] = set()
    for step in range(1, 11):
        for edit in edits:
            for parameter in edit.trained().values():
                parameter.grad = torch.randn_like(parameter)
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        before = [edit.lora_lambda.detach().clone() for edit in edits]
        if step <= 7:
            for number, edit in enumerate(edits):
                for name, parameter in edit.trained().items():
                    assert parameter.grad is not None
                    for index, (w, g) in enumerate(
                        zip(parameter.flatten().tolist(), parameter.grad.flatten().tolist(), strict=True)
                    ):
                        sensitivity, uncertainty = smoothed.get((number, name, index), (0.0, 0.0))
                        sensitivity = 0.6 * sensitivity + 0.4 * abs(w * g)
                        uncertainty = 0.7 * uncertainty + 0.3 * abs(abs(w * g) - sensitivity)
                        smoothed[number, name, index] = (sensitivity, uncertainty)
        if step in (2, 4, 6, 7):
            scores = {}
            for number, (num_out, num_in) in enumerate(((5, 4), (3, 7))):
                for k in range(3):
                    s = {key: math.prod(pair) for key, pair in smoothed.items()}
                    of_P = sum(s[number, "lora_P", 3 * i + k] for i in range(num_out)) / num_out
                    of_Q = sum(s[number, "lora_Q", num_in * k + j] for j in range(num_in)) / num_in
                    scores[number, k] = s[number, "lora_lambda", k] + of_P + of_Q
            # 2 + 4 (5/6)^3 = 4.3, 2 + 4 / 8 = 2.5 (to even), 2 + 4 / 216, and the target.
            budget = {2: 4, 4: 2, 6: 2, 7: 2}[step]
            pruned = set(sorted(scores, key=lambda key: -scores[key])[budget:])
        Adaptive.after_step(edits, step, 10)
        for number, edit in enumerate(edits):
            for k in range(3):
                gone = (number, k) in pruned and step in (2, 4, 6, 7, 8, 9, 10)
                assert float(edit.lora_lambda.detach()[k]) == (0.0 if gone else float(before[number][k])), (
                    step,
                    number,
                    k,
                )


def test_seed_and_recipe_decide_the_start(micro_model: Path) -> None:
    """Three groups, the default ranks, and the base to the bit."""
    model = load_model(str(micro_model))
    adapted = attach(model, make_plan(model, named_recipe("adalora", rank=6)))
    assert {site.group for site in adapted.plan.sites} == {"attention", "recurrent", "mlp"}
    assert adapted.plan.trainable == sum(6 * (sum(site.shape) + 1) for site in adapted.plan.sites)
    base = dict(load_model(str(micro_model)).named_parameters())
    assert all(torch.equal(value, base[path].detach()) for path, value in effective_tensors(adapted).items())
