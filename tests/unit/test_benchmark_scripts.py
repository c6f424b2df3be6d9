"""The scripts that measure speed, and the tables that their records become."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as modeling

from ssmtune import bench as bench_module
from ssmtune.bench import BenchConfig, bench
from ssmtune.errors import CheckFailed, ConfigError, RecordError
from ssmtune.graphs import SWITCH
from ssmtune.memory import recomputes
from ssmtune.models import load_tokenizer
from ssmtune.ops import backend
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan
from ssmtune.report import write_report

ROOT = Path(__file__).parents[2]


def load(folder: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OPERATIONS, SMALL_TERMS, TRAINING, CURVE, TABLES = (
    load("benchmarks", "operations"),
    load("benchmarks", "small_terms"),
    load("benchmarks", "training"),
    load("benchmarks", "loss_curve"),
    load("recipes", "speed_tables"),
)


@pytest.fixture
def micro(tmp_path: Path) -> str:
    """A config of one Mamba-2 layer and one of attention."""
    config = GraniteMoeHybridConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        shared_intermediate_size=24,
        num_local_experts=0,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        layer_types=["linear_attention", "full_attention"],
        pad_token_id=0,
    )
    path = tmp_path / "micro.json"
    path.write_text(json.dumps(config.to_dict()))
    return str(path)


def run_of(side: str, step_s: float, **facts: Any) -> dict[str, Any]:
    """What a side's process answers."""
    kernels = {
        "kinds": {"scan": 3.0, "matrix products": 5.0},
        "slowest": [{"name": f"kernel_of_{side}", "kind": "scan", "count": 2, "ms": 3.0}],
    }
    return {
        "step_s": [step_s],
        "first_step_s": 1.0,
        "first_loss": 4.0,
        "peak_memory_bytes": 2**30,
        "num_trained": 8 if side == "ssmtune" else 6,
        "dead": [],
        "operations": f"operations of {side}",
        "components": {"mlp": 1.0},
        "kernels": kernels,
        "processed_tokens": 64 if side == "ssmtune" else 160,
        "num_documents": 4,
        "useful_tokens": 60,
        "floor_s": 0.25,
        "shape": {"dtype": "float32", "parameters": 7, "trainable": 3, "tokens": [1, 64], "quantization": None},
        "device": "some device",
        **facts,
    }


def answer(monkeypatch: pytest.MonkeyPatch, ours: float = 1.0, theirs: float = 2.0, **facts: Any) -> None:
    """Let both sides answer without being run, with steps of so many seconds."""
    monkeypatch.setattr(
        bench_module, "_run_side", lambda config, side: run_of(side, ours if side == "ssmtune" else theirs, **facts)
    )


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments])
    code: int = TRAINING.main()
    return code


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_nan_is_the_worst_error_of_an_operation(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = dict.fromkeys(("first", "middle", "last"), 1e-7) | {place: float("nan")}
    monkeypatch.setattr(OPERATIONS, "errors", lambda *args, **options: (ours, dict.fromkeys(ours, 1e-7)))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **options: None)
    found = OPERATIONS.worst_error(None, torch.float32, [("here", {}, {})])
    assert found["tensor"] == place and not found["ok"]


def test_every_measurement_is_of_a_shape_and_has_a_name_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [m.name for m in TRAINING.MEASUREMENTS]
    assert len(set(names)) == len(names)
    assert {m.shape for m in TRAINING.MEASUREMENTS} == {
        path.stem for path in (ROOT / "benchmarks/shapes").glob("*.json")
    }
    assert run_script(monkeypatch, "--plan") == 0
    planned = capsys.readouterr().out
    assert all(f"{name} " in planned for name in names)
    seconds = [float(found) for found in re.findall(r"about +(\d+) s", planned)]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=len(names))
    for measurement in TRAINING.MEASUREMENTS:
        # As bench() would refuse them.
        assert TRAINING.to_config(measurement, "tiny-granite-h", "cpu").tokens_per_step % measurement.row_length == 0
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "--only", "no-such-thing")


def test_a_failure_is_recorded_and_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch)

    def broken(config: BenchConfig, **options: Any) -> dict[str, Any]:
        if config.memory == "fast":
            raise CheckFailed("ssmtune's own side did not finish: torch.OutOfMemoryError: CUDA out of memory.")
        return bench(config, **options)

    monkeypatch.setattr(TRAINING, "bench", broken)
    chosen = ["--only", "granite*1x8192-fast", "granite*1x8192-small", "--toy", "--out", str(tmp_path)]
    assert run_script(monkeypatch, *chosen) == 1
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    fast, small = (records[f"granite-4.0-h-micro-1x64-{memory}-cpu"] for memory in ("fast", "small"))
    assert fast["status"] == "failed" and "out of memory" in fast["error"]
    assert small["status"] in ("done", "provisional") and small["ratio"]["median"] == 2.0
    monkeypatch.setattr(TABLES, "BENCH", tmp_path)
    rows = TABLES.steps().splitlines()[2:]
    assert "| out of memory |" in rows[0] and len(rows) == 3
    assert "| 60 (60-60) | 2.0 | 25% |" in rows[1]
    # What the other side lacks is said, and what it ran on.
    assert "transformers+peft on operations of transformers+peft | 30 (30-30) |" in rows[2]
    assert "| 0 of 6, 2 left out |" in rows[2]
    # Nothing starts once the time is over.
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert run_script(monkeypatch, *chosen, "--seconds", "-1") == 0
    assert not list(tmp_path.glob("*.json")) and "not started" in capsys.readouterr().out


def test_longer_rows_than_fit_are_computed_again_in_the_backward_pass(
    micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = TRAINING.measure

    def small_device(config: BenchConfig, side: str) -> dict[str, Any]:
        if config.row_length > 16 and config.memory == "fast" or config.row_length > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        found: dict[str, Any] = measured(config, side)
        return found

    monkeypatch.setattr(TRAINING, "measure", small_device)
    series = TRAINING.Measurement(shape="any", lengths=(16, 32, 128), peer=False)
    configs = [TRAINING.to_config(m, micro, "cpu") for m in TRAINING.each_length(series)]
    entries = list(TRAINING.run_lengths([TRAINING.replace(config, num_steps=1, rank=2) for config in configs]))
    # The profile of one length switches graphs off, for itself alone.
    assert SWITCH not in os.environ
    assert [(entry["length"], entry["memory"]) for entry in entries] == [(16, "fast"), (32, "small"), (128, "small")]
    assert "error" in entries[2] and all(entry["tokens_per_s"] > 0 and not entry["dead"] for entry in entries[:2])
    record = TRAINING.new_record("benchmark", config={**vars(configs[0]), "benchmark": "lengths"}, entries=entries)
    record["config"]["quantize"] = None
    TRAINING.write_json(tmp_path / "b" / "x-lengths.json", record)
    monkeypatch.setattr(TABLES, "BENCH", tmp_path / "b")
    rows = TABLES.lengths().splitlines()[2:]
    assert "| 1 x 16 | fast |" in rows[0] and "| 1.00 |" in rows[0]
    assert "| 1 x 128 | small | out of memory |" in rows[2]
    assert "lengths" in write_report([record], tmp_path / "r.html", "r").read_text()


def test_tables_of_documents_of_four_bits_and_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLES, "BENCH", tmp_path)
    assert {table() for table in (TABLES.steps, TABLES.packed, TABLES.qlora, TABLES.curve, TABLES.profile)} == {
        TABLES.NO_RECORD
    }
    answer(monkeypatch)
    config = BenchConfig(model="tiny-granite-h", tokens_per_step=64, row_length=64, repeats=1)
    older = bench(config, on_message=str)
    older["created"] = "2020-01-01T00:00:00+00:00"
    older["sides"]["ssmtune"]["tokens_per_s"] = 1.0
    plain = bench(config, on_message=str)
    documents = bench(TRAINING.replace(config, documents=16), on_message=str)
    held = {"bytes_before": 2**31, "bytes_after": 2**30}
    shape = {**run_of("ssmtune", 1.0)["shape"], "quantization": held}
    answer(monkeypatch, 4.0, 4.0, shape=shape)
    quantized = bench(TRAINING.replace(config, quantize=TRAINING.QuantizeConfig()), on_message=str)
    for name, record in (("a", older), ("b", plain), ("c", documents), ("d", quantized)):
        TRAINING.write_json(tmp_path / f"{name}.json", record)
    # The older record of the same measurement is history.
    assert "b.json" in TABLES.steps() and "a.json" not in TABLES.steps() and "c.json" not in TABLES.steps()
    ours, theirs = TABLES.packed().splitlines()[2:]
    assert "| 4, of 15 in the mean | ssmtune | 60 (60-60) | 2.0 | 64 | 6% |" in ours
    assert "| 30 (30-30) |  | 160 | 62% |" in theirs
    ours, theirs = TABLES.qlora().splitlines()[2:]
    assert "| ssmtune | 15 (15-15) | 0.25 | 1.0 | 1.00 of 2.00 GiB |" in ours and "| 0.50 |" in theirs
    kinds = TABLES.profile().splitlines()
    assert "| matrix products | scan | all kernels | timed step |" in kinds[0] and len(kinds) == 2 + 6
    assert "| 5.0 | 3.0 | 8.0 | 1,000.0 |" in kinds[2]
    assert "| `kernel_of_ssmtune` | scan | 2 | 3.00 |" in TABLES.kernels()
    # Two sides that compute different losses have no speed.
    plain["parity"]["ok"] = False
    TRAINING.write_json(tmp_path / "b.json", plain)
    assert TABLES.steps().count("losses differ") == 2 and "60 (60-60)" not in TABLES.steps()


def test_rows_of_the_curve_are_the_text_cut_at_documents_and_halves(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One document.\n<|doc|>\nAnother one, which is longer.")
    num = CURVE.write_tokens([text], tmp_path / "ids.npy", 1000)
    ids = np.load(tmp_path / "ids.npy", allow_pickle=False)
    tokenizer = load_tokenizer("tiny-granite-h")
    assert len(ids) == num and ids[0] == tokenizer.eos_token_id and (ids == ids[0]).sum() == 2
    assert tokenizer.decode(ids[1:]).startswith("One document.")
    ids = np.array([9, 1, 2, 9, 3, 4, 5, 6, 9, 7, 8, 1], dtype=np.uint16)
    halves = CURVE.make_rows(ids, 3, 4)
    assert [row["seq_lengths"] for row in halves] == [[3], [3], [2, 1], [3]]
    whole = CURVE.joined(halves)
    assert [row["input_ids"] for row in whole] == [[9, 1, 2, 9, 3, 4], [5, 6, 9, 7, 8, 1]]
    assert [row["seq_lengths"] for row in whole] == [[3, 3], [2, 1, 3]]
    with pytest.raises(ConfigError, match="need 15 ids and there are 12"):
        CURVE.make_rows(ids, 3, 5)


@pytest.mark.parametrize(
    ("name", "other", "factor", "base"),
    [
        ("within noise", "split", 3, "plain"),
        ("within the noise between kernels", "mamba_ssm", 2, "plain"),
        ("as near to fp32 as the plain path", "plain", 1.25, "exact"),
        ("within the noise between draws of the adapters", "reseeded", 1, "plain"),
    ],
)
def test_the_verdict_is_the_rule(name: str, other: str, factor: float, base: str) -> None:
    noise = [0.1 * (-1) ** step for step in range(16)]
    center = [5.0 - 0.1 * step for step in range(16)]

    def verdict(gap: list[float]) -> bool:
        curves = {
            base: center,
            "fast": [p + g for p, g in zip(center, gap, strict=True)],
            other: [p + n for p, n in zip(center, noise, strict=True)],
        }
        # The arm that the other rule names did not run.
        (found,) = CURVE.compare(curves)["verdicts"].items()
        assert found[0] == name and f"at most {factor} times that of |{other} - {base}|" in found[1]["rule"]
        holds: bool = found[1]["holds"]
        return holds

    assert verdict([(factor - 0.1) * n for n in noise])
    assert not verdict([(factor + 0.1) * n for n in noise])
    # As small as the noise in size, but always on one side at the end.
    assert not verdict([0.11] * 16) and not verdict([-0.11] * 16) and verdict([0.09] * 16)
    # A run that was stopped early counts over the steps that it made, and one of three steps not at all.
    curves = {base: center, "fast": [*center[:8], *[9.0] * 8], other: [p + 0.1 for p in center[:8]]}
    assert CURVE.compare(curves)["verdicts"][name] | {"rule": ""} == {"rule": "", "num_steps": 8, "holds": True}
    assert CURVE.compare({**curves, other: center[:3]})["verdicts"] == {}
    assert CURVE.compare({base: center}) is None


def test_each_two_runs_are_apart_by_their_losses() -> None:
    curves = {"fast": [4.0, 3.0, 2.0, 1.0], "mamba_ssm": [4.0, 3.5, 2.0, 1.25], "plain": [4.25, 3.0, 2.0, 1.5, 0.0]}
    pairs = CURVE.compare(curves)["pairs"]
    assert list(pairs) == ["mamba_ssm - plain", "fast - plain", "fast - mamba_ssm"]
    assert pairs["fast - plain"] == {
        "num_steps": 4,
        "first": 0.25,
        "mean": 0.1875,
        "largest": 0.5,
        "last_quarter": -0.5,
        "last_quarter_mean": 0.5,
    }
    assert pairs["mamba_ssm - plain"]["last_quarter"] == -0.25 and pairs["fast - mamba_ssm"]["last_quarter"] == -0.25
    assert pairs["mamba_ssm - plain"]["mean"] == 0.25


def test_arms_are_named_once_and_as_they_are() -> None:
    assert CURVE.to_arms("plain,mamba_ssm") == ("plain", "mamba_ssm")
    with pytest.raises(ConfigError, match="'mamba-ssm' is no arm; nearest: 'mamba_ssm'"):
        CURVE.to_arms("plain,mamba-ssm")
    with pytest.raises(ConfigError, match="'fast' twice"):
        CURVE.to_arms("fast,plain,fast")


@pytest.fixture
def curve_setup(micro: str, tmp_path: Path) -> tuple[Any, Path]:
    ids = np.random.default_rng(0).integers(1, 97, 5 * 64).astype(np.uint16)
    np.save(tmp_path / "ids.npy", ids, allow_pickle=False)
    return CURVE.Setup(model=micro, device="cpu", rank=2, num_steps=5, row_length=64), tmp_path / "ids.npy"


def test_the_exact_arm_trains_the_same_weights_in_fp32(curve_setup: tuple[Any, Path], tmp_path: Path) -> None:
    setup, ids = curve_setup
    record = CURVE.run(setup, ids, tmp_path / "e.json", float("inf"), ("exact", "plain"))
    exact, plain = (record["arms"][arm] for arm in ("exact", "plain"))
    # A model on a CPU is in fp32 anyway.
    assert exact["losses"] == plain["losses"] and exact["memory"] == "small" and "base_digest" not in exact
    layer = torch.nn.Linear(3, 2).bfloat16()
    before = layer.weight.detach().clone()
    with CURVE.weights_of("plain", layer):
        assert layer.weight.dtype == torch.bfloat16
    with CURVE.weights_of("exact", layer):
        assert layer.weight.dtype == layer.bias.dtype == torch.float32
        assert torch.equal(layer.weight.detach(), before.float())
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.detach(), before)


def test_both_paths_learn_alike_and_a_broken_one_does_not(
    curve_setup: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, ids = curve_setup
    (tmp_path / "b").mkdir()
    record = CURVE.run(setup, ids, tmp_path / "b" / "curve.json", float("inf"))
    assert record["status"] in ("done", "provisional")
    arms = record["arms"]
    losses = {arm: facts["losses"] for arm, facts in arms.items() if arm != "mamba_ssm"}
    assert list(losses) == ["fast", "plain", "split", "reseeded", "repeat"]
    assert all(len(curve) == 5 for curve in losses.values())
    # fp32: another order of summation, and what five steps make of it.
    assert losses["fast"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["split"] == pytest.approx(losses["plain"], abs=1e-4)
    # Adapters begin at nothing, whatever was drawn for their first factor.
    assert losses["reseeded"][0] == losses["plain"][0] and losses["reseeded"][1:] != losses["plain"][1:]
    assert arms["reseeded"]["base_digest"] == arms["plain"]["base_digest"]
    assert losses["repeat"] == losses["fast"] and arms["repeat"]["operations"] == arms["fast"]["operations"]
    assert "layers rewritten" in arms["fast"]["operations"] and arms["fast"]["head"] == "without logits"
    assert arms["plain"]["operations"] == "ssmtune's causal_conv1d (reference), mamba2_chunk_scan (reference)"
    # Not on transformers' own in its place.
    assert arms["mamba_ssm"]["losses"] == [] and "causal_conv1d and mamba_ssm cannot be" in arms["mamba_ssm"]["refused"]
    assert list(record["comparison"]["verdicts"]) == [
        "within noise",
        "within the noise between draws of the adapters",
    ]
    monkeypatch.setattr(TABLES, "BENCH", tmp_path / "b")
    shown = TABLES.curve()
    assert (
        "fast is **within noise**" in shown and "| fast - plain | 5 |" in shown and "| repeat - fast | 5 | 0.0" in shown
    )
    assert "Without mamba_ssm: GraniteMoeHybridMambaLayer: transformers runs" in shown
    # A report of records takes it, as what has no step to draw.
    assert "loss-curve" in write_report([record], tmp_path / "r.html", "r").read_text()

    attach = CURVE.attach

    def half_trained(model: Any, plan: Any, fast: str) -> Any:
        adapted = attach(model, plan, fast=fast)
        if fast == "require":
            for name, parameter in adapted.trained_parameters().items():
                if "lora_B" in name:
                    parameter.register_hook(torch.zeros_like)
        return adapted

    monkeypatch.setattr(CURVE, "attach", half_trained)
    monkeypatch.setattr("ssmtune.watch._refuse_dead", lambda groups, waiting: None)
    record = CURVE.run(setup, ids, tmp_path / "c" / "broken.json", float("inf"), ("split", "plain", "fast"))
    assert record["comparison"]["verdicts"]["within noise"]["holds"] is False
    monkeypatch.setattr(TABLES, "BENCH", tmp_path / "c")
    assert "fast is **not within noise**" in TABLES.curve()


def test_a_stopped_curve_leaves_what_there_is(curve_setup: tuple[Any, Path], tmp_path: Path) -> None:
    setup, ids = curve_setup
    CURVE.run(setup, ids, tmp_path / "part.json", 0.0)
    record = json.loads((tmp_path / "part.json").read_text())
    assert record["status"] == "aborted" and record["comparison"] is None
    assert list(record["arms"]) == ["fast"] and len(record["arms"]["fast"]["losses"]) == 1


def test_kernels_of_packages_run_in_place_of_ours_and_no_whole_layer(
    curve_setup: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the names that transformers' layer calls are functions of no package and not transformers' own."""
    setup, ids = curve_setup
    called = []

    def convolution(x: Any, weight: Any, bias: Any, activation: str, seq_idx: Any, **_: Any) -> Any:
        called.append("convolution")
        return causal_conv1d(x, weight, bias, activation, seq_idx=seq_idx)

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any, seq_idx: Any, **_: Any) -> Any:
        called.append("scan")
        return mamba2_chunk_scan(x, dt, A, B, C, D_H=D, dt_bias_H=dt_bias, dt_softplus=True, seq_idx=seq_idx)[0]

    def whole_layer(*_: Any, **__: Any) -> Any:
        called.append("whole layer")
        return torch.zeros(1, 64, 32)

    functions = {"causal_conv1d_fn": convolution, "mamba2_chunk_scan": scan}
    functions |= {"mamba2_split_conv1d_scan_combined": whole_layer}
    for name in ("causal_conv1d_update", "mamba2_selective_state_update"):
        monkeypatch.setattr(modeling, name, None)
    for name, function in functions.items():
        monkeypatch.setattr(modeling, name, function)
    record = CURVE.run(setup, ids, tmp_path / "curve.json", float("inf"), ("mamba_ssm", "plain"))
    arms = record["arms"]
    # One layer, five steps, and nothing of it in the other arm.
    assert called == ["convolution", "scan"] * 5
    assert arms["mamba_ssm"]["losses"] == arms["plain"]["losses"] and len(arms["plain"]["losses"]) == 5
    assert arms["mamba_ssm"]["base_digest"] == arms["plain"]["base_digest"]


def test_the_reference_is_asked_for_its_arm_alone(
    curve_setup: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, ids = curve_setup
    seen = []
    run_arm = CURVE.run_arm

    def watched(model: Any, plan: Any, arm: str, *given: Any) -> None:
        run_arm(model, plan, arm, *given)
        seen.append((arm, os.environ.get(backend.SWITCH), recomputes(model)))
        if arm == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(CURVE, "run_arm", watched)
    record = CURVE.run(setup, ids, tmp_path / "curve.json", float("inf"), ("reference", "plain"))
    # The next arm runs, and recomputes nothing.
    assert seen == [("reference", "reference", False), ("plain", None, False)]
    assert record["arms"]["reference"]["refused"] == "CUDA out of memory. Tried to allocate 2 GiB"
    assert [record["arms"][arm]["memory"] for arm in ("reference", "plain")] == ["small", "fast"]
    assert record["arms"]["reference"]["losses"] == record["arms"]["plain"]["losses"]


def test_a_run_that_was_stopped_shows_nothing_at_steps_that_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"operations": "x", "seconds": {"train": 2.0}, "device": "GPU A"}
    arms = {"plain": {**facts, "losses": [9.0, 8.0, 7.0, 6.0, 5.0]}, "fast": {**facts, "losses": [9.0, 8.0, 7.0]}}
    config = {"benchmark": "loss-curve", "model": "m.json", "num_steps": 5, "row_length": 4}
    record = CURVE.new_record("benchmark", config=config, status="aborted", arms=arms, comparison=None)
    CURVE.write_json(tmp_path / "curve.json", record)
    monkeypatch.setattr(TABLES, "BENCH", tmp_path)
    shown = TABLES.curve()
    assert "| plain | x | 9.0000 | 8.0000 | 7.0000 | 6.0000 | 5.0000 | 10 | 2 s |" in shown
    assert "| fast | x | 9.0000 | 8.0000 | 7.0000 |  |  | 6 | 2 s |" in shown
    # Without a run in fp32 there is nothing to be near to; with one, runs that made all steps are held to it.
    assert TABLES.exactness() == TABLES.NO_RECORD
    arms |= {"exact": {"losses": [9.0, 7.5, 7.0, 6.0, 5.5]}, "split": {"losses": [9.0, 9.0, 7.0, 6.0, 4.0]}}
    CURVE.write_json(tmp_path / "curve.json", {**record, "arms": arms})
    first, *_, second = TABLES.exactness().splitlines()[2:]
    assert first == "| plain - exact | +0.0e+00 | +5.0e-01 | +0.0e+00 | +0.0e+00 | -5.0e-01 | 1.000 |"
    assert second == "| split - exact | +0.0e+00 | +1.5e+00 | +0.0e+00 | +0.0e+00 | -1.5e+00 | 1.000 |"


def test_records_of_several_processes_become_one(tmp_path: Path) -> None:
    def write(name: str, device: str, arms: dict[str, list[float]], **differing: Any) -> Path:
        facts = {arm: {"losses": curve, "device": device, "base_digest": "d"} for arm, curve in arms.items()}
        # Its weights are in fp32 and have no digest that the others' could be compared with.
        facts.get("exact", {}).pop("base_digest", None)
        config = {"benchmark": "loss-curve", "num_steps": 4, "tokens": "t", **differing}
        record = CURVE.new_record("benchmark", config=config, status="done", arms=facts, comparison=None, seconds=1.0)
        record["environment"] |= {"device": device, "dirty": False}
        record["shape"] = {"parameters": 7}
        path: Path = CURVE.write_json(tmp_path / name, record)
        return path

    curve = [4.0, 3.0, 2.0, 1.0]
    one = write("one.json", "GPU A", {"fast": curve, "plain": curve, "split": curve[:2]})
    two = write("two.json", "GPU B", {"mamba_ssm": curve, "split": curve, "reseeded": curve})
    three = write("three.json", "GPU B", {"exact": curve})
    merged = CURVE.merge([one, two, three], tmp_path / "whole.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == merged
    assert {arm: (len(found["losses"]), found["device"]) for arm, found in merged["arms"].items()} == {
        "fast": (4, "GPU A"),
        "plain": (4, "GPU A"),
        "split": (4, "GPU B"),
        "mamba_ssm": (4, "GPU B"),
        "reseeded": (4, "GPU B"),
        "exact": (4, "GPU B"),
    }
    assert merged["status"] == "done" and merged["environment"]["device"] == "GPU A and GPU B"
    assert set(merged["comparison"]["verdicts"]) == set(CURVE.RULES) and merged["seconds"] == 3.0
    assert CURVE.merge([one], tmp_path / "part.json")["status"] == "aborted"
    with pytest.raises(RecordError, match="holds 'plain', which a record before it holds"):
        CURVE.merge([one, write("plain.json", "GPU B", {"plain": curve})], tmp_path / "no.json")
    with pytest.raises(RecordError, match="tokens is 'u' there and 't' before"):
        CURVE.merge([one, write("other.json", "GPU A", {"mamba_ssm": curve}, tokens="u")], tmp_path / "no.json")
    for part, name, found in (("environment", "commit", "c"), ("shape", "parameters", 8), ("arms", "mamba_ssm", {})):
        record = json.loads(two.read_text())
        record[part][name] = found if part != "arms" else {"losses": curve, "base_digest": "e"}
        CURVE.write_json(tmp_path / "differs.json", record)
        with pytest.raises(RecordError, match="weights is" if part == "arms" else f"{name} is"):
            CURVE.merge([one, tmp_path / "differs.json"], tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()


def test_what_arrives_of_a_small_term_depends_on_where_it_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SMALL_TERMS, "NUM_ROWS", 512)
    monkeypatch.setattr(SMALL_TERMS, "EXPONENTS", (-14, -4))
    monkeypatch.setattr(sys, "argv", ["small_terms.py", "--out", str(tmp_path / "small-terms-cpu.json")])
    threads = torch.get_num_threads()
    SMALL_TERMS.main()
    torch.set_num_threads(threads)
    assert "term in the product, residual of 8: 2^-14 " in capsys.readouterr().out
    shares = json.loads((tmp_path / "small-terms-cpu.json").read_text())["shares"]
    for side, found in shares.items():
        tiny, large = found["-14"], found["-4"]
        assert large["share"] == pytest.approx(1, abs=0.05), side
        if side == "fp32":
            assert tiny["share"] == pytest.approx(1, abs=1e-3) and tiny["changed"] > 0.99
        elif side.startswith("term in the product"):
            assert abs(tiny["share"] - 1) < 5 * tiny["standard_error"] < 0.5, side
        elif side.startswith("plain") or side == "rewritten":
            assert tiny["share"] < 0.1, side
        else:
            # Product and residual lie on the grid of bf16, and so often half-way between two numbers of the sum's.
            assert tiny["share"] > 5, side
    monkeypatch.setattr(TABLES, "BENCH", tmp_path)
    header, _, *rows = TABLES.small_terms().splitlines()
    assert header == "| share that arrives of a term of | 2^-14 | 2^-4 |" and len(rows) == 10
    assert rows[-1] == "| fp32 | 1.00 | 1.00 |"
