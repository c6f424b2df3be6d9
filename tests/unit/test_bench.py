"""Bench: what is computed from the measurements, and one run of both sides on a micro model."""

from __future__ import annotations

import inspect
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteMoeHybridConfig, LlamaConfig, Mamba2Config
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as modeling

from ssmtune import bench as bench_module
from ssmtune.bench import LOSS_LIMITS, BenchConfig, bench, compare_losses, speed_ratio, summarise
from ssmtune.bench_batch import document_lengths, make_batches
from ssmtune.bench_profile import called_operations, kernel_kind, profile_step
from ssmtune.bench_side import base_model, exact_loss, measure
from ssmtune.cli.main import main
from ssmtune.config import decode
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.causal_conv1d.reference import check_window
from ssmtune.quantized import QuantizeConfig

MICRO = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def run_of(*seconds: float, loss: float = 4.0, **facts: Any) -> dict[str, Any]:
    """What a side's process answers."""
    return {
        "step_s": list(seconds),
        "first_step_s": 1.0,
        "first_loss": loss,
        "peak_memory_bytes": 10,
        "num_trained": 3,
        "dead": [],
        "operations": "off",
        "components": {"mlp": 1.0},
        "processed_tokens": 12,
        "useful_tokens": 12,
        "floor_s": 0.25,
        "shape": {"dtype": "float32"},
        "device": "cpu",
        **facts,
    }


def test_figures_are_medians_and_ranges_over_processes() -> None:
    side = summarise([run_of(1.0, 2.0, 3.0), run_of(4.0, 4.0, 4.0)], 12)
    assert side["step_s"] == 3.5
    assert side["tokens_per_s"] == pytest.approx(12 / 3.5)
    assert side["tokens_per_s_range"] == [3.0, 6.0]
    assert side["components"] == {"mlp": 3.5}
    assert side["operations"] == "off"
    ratio = speed_ratio({"ssmtune": [run_of(1.0), run_of(2.0)], "transformers+peft": [run_of(3.0), run_of(10.0)]})
    assert ratio == {"median": 4.0, "range": [3.0, 5.0]}


def test_a_side_that_failed_has_no_speed() -> None:
    broken = [run_of(1.0), {"error": "out of memory"}]
    assert summarise(broken, 12) == {"error": "out of memory"}
    assert speed_ratio({"ssmtune": [run_of(1.0)] * 2, "transformers+peft": broken}) is None


def test_other_losses_void_the_comparison() -> None:
    same = compare_losses({"ssmtune": [run_of(1.0)], "transformers+peft": [run_of(1.0, loss=4.00002)]})
    other = compare_losses({"ssmtune": [run_of(1.0)], "transformers+peft": [run_of(1.0, loss=4.001)]})
    assert same["ok"]
    assert not other["ok"]


@pytest.mark.parametrize(
    ("ours", "theirs", "exact", "ok"),
    [
        (4.0, 4.2, 4.001, True),
        (4.2, 4.0, 4.001, False),
        (3.9, 4.11, 4.0, True),
        (4.11, 3.9, 4.0, False),
        (4.0, 4.0, 9.0, True),
    ],
)
def test_the_loss_in_fp32_tells_rounding_from_a_fault(ours: float, theirs: float, exact: float, ok: bool) -> None:
    """Ours has to be near it, or no farther from it than the peer; sides that agree need no third opinion."""
    shape = {"dtype": "bfloat16"}
    runs = {"ssmtune": [run_of(1.0, loss=ours) | {"shape": shape}], "transformers+peft": [run_of(1.0, loss=theirs)]}
    found = compare_losses(runs, exact)  # type: ignore[arg-type]
    assert found["ok"] is ok
    assert found["from_exact"]["ssmtune"] == pytest.approx(abs(ours - exact) / exact)


@pytest.mark.parametrize(
    ("facts", "exact", "status"),
    [
        ({}, {}, {"done", "provisional"}),
        ({"loss": 5.0}, {"first_loss": 4.0}, {"failed"}),
        ({"loss": 5.0}, {"first_loss": 5.0}, {"done", "provisional"}),
        ({"loss": 5.0}, {"error": "out of memory"}, {"failed"}),
        ({"dead": ["x"]}, {}, {"failed"}),
    ],
)
def test_status_follows_parity_and_dead_tensors(
    facts: dict[str, Any], exact: dict[str, Any], status: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"ssmtune": run_of(1.0, **facts), "transformers+peft": run_of(2.0), "exact": exact}
    monkeypatch.setattr(bench_module, "_run_side", lambda config, side: answers[side])
    config = BenchConfig(model="tiny-granite-h", repeats=2)
    record = bench(config, on_message=lambda _: None)
    assert record["status"] in status
    assert record["ratio"]["median"] == 2.0
    assert record["floor"] == {"step_s": 0.25, "share": 0.25}


def test_the_exact_loss_is_that_of_the_model_in_fp32(tmp_path: Path) -> None:
    config = micro_bench(tmp_path)
    torch.manual_seed(0)
    model = base_model(config)
    batches = make_batches(config, "transformers+peft", model.config.vocab_size)
    with torch.no_grad():
        expected = sum(
            float(model(input_ids=batch["input_ids"], labels=batch["labels"]).loss) * batch["share"]
            for batch in batches
        )
    assert exact_loss(config)["first_loss"] == pytest.approx(expected, rel=LOSS_LIMITS["float32"])


def test_the_command_names_the_operations_of_the_other_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"dtype": "float32", "parameters": 3, "trainable": 1, "tokens": [1, 4], "quantization": None}
    answers = {"ssmtune": run_of(1.0), "transformers+peft": run_of(2.0, operations="mamba_ssm 9.9")}
    monkeypatch.setattr(bench_module, "_run_side", lambda config, side: answers[side] | {"shape": shape})
    monkeypatch.setattr(sys, "argv", ["ssmtune", "bench", "tiny-granite-h", "--repeats", "1"])
    with pytest.raises(SystemExit):
        main()
    assert "Operations of transformers+peft: mamba_ssm 9.9." in capsys.readouterr().out


def test_our_own_failure_is_an_error_and_a_bad_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_run_side", lambda config, side: {"error": "killed"})
    with pytest.raises(CheckFailed, match="killed"):
        bench(BenchConfig(model="tiny-granite-h", repeats=1), on_message=lambda _: None)
    with pytest.raises(ConfigError, match="no multiple of row_length 100"):
        bench(BenchConfig(model="tiny-granite-h", tokens_per_step=250, row_length=100))
    with pytest.raises(ConfigError, match="longer than a row of 100"):
        bench(BenchConfig(model="tiny-granite-h", tokens_per_step=200, row_length=100, documents=101))


def test_short_documents_are_the_same_on_both_sides_packed_on_ours_and_padded_on_the_peers() -> None:
    config = BenchConfig(model="tiny-granite-h", tokens_per_step=2048, row_length=512, documents=40)
    lengths = document_lengths(40, 2048, 512)
    assert 35 < sum(lengths) / len(lengths) < 45 and max(lengths) > 5 * min(lengths)
    (ours,) = make_batches(config, "ssmtune", 97)
    theirs = make_batches(config, "transformers+peft", 97)
    assert ours["num_tokens"] == sum(batch["num_tokens"] for batch in theirs) == sum(lengths)
    assert ours["num_documents"] == sum(batch["num_documents"] for batch in theirs) == len(lengths)
    assert ours["input_ids"].shape == (4, 512) and sum(lengths) > 0.9 * 2048
    # The documents themselves, found again in both.
    starts = [(row, int(column)) for row in range(4) for column in (ours["position_ids"][row] == 0).nonzero()]
    packed = []
    for row, column in starts:
        rest = ours["position_ids"][row, column:]
        stop = int((rest[1:] == 0).nonzero()[0]) + 1 if (rest[1:] == 0).any() else len(rest)
        packed.append(ours["input_ids"][row, column : column + stop].tolist())
    padded = [
        row[mask.bool()].tolist()
        for batch in theirs
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(map(len, padded)) == sorted(lengths)
    assert all(document in packed for document in padded)
    for batch in theirs:
        assert len(batch["input_ids"]) <= 8 and (batch["labels"] == -100).equal(batch["attention_mask"] == 0)
        assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
    assert sum(batch["share"] for batch in theirs) == pytest.approx(1.0)
    assert len(ours["targets"]) == sum(lengths) - len(lengths)


def micro_bench(folder: Path, **fields: Any) -> BenchConfig:
    """The benchmark of a model of one Mamba-2 layer and one of attention, as it reaches the process of a side."""
    path = folder / "micro.json"
    shape = {
        **MICRO,
        "shared_intermediate_size": 24,
        "num_local_experts": 0,
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "pad_token_id": 0,
    }
    path.write_text(json.dumps(GraniteMoeHybridConfig(**shape).to_dict()))
    length = 16 if fields.get("documents") is None else 64
    rows = {"tokens_per_step": 2 * length, "row_length": length}
    config = BenchConfig(model=str(path), rank=2, num_steps=1, repeats=1, **rows, **fields)
    return decode(BenchConfig, json.loads(json.dumps(asdict(config))), where="test")


@pytest.mark.parametrize(
    ("memory", "quantize", "documents"),
    [
        ("fast", None, None),
        ("balanced", None, None),
        ("small", None, None),
        ("fast", QuantizeConfig(), None),
        ("fast", None, 9),
    ],
)
def test_both_sides_do_the_same_work(
    memory: str, quantize: QuantizeConfig | None, documents: int | None, tmp_path: Path
) -> None:
    config = micro_bench(tmp_path, memory=memory, quantize=quantize, documents=documents)
    ours, theirs = measure(config, "ssmtune"), measure(config, "transformers+peft")
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert ours["num_trained"] == theirs["num_trained"]
    assert ours["dead"] == theirs["dead"] == []
    assert theirs["operations"] == "transformers' own, without causal_conv1d, mamba_ssm"
    assert ours["floor_s"] > 0
    assert ours["useful_tokens"] == theirs["useful_tokens"] <= ours["processed_tokens"]
    assert (ours["processed_tokens"] < theirs["processed_tokens"]) == (documents is not None)
    held = ours["shape"]["quantization"]
    assert (held is None) == (quantize is None) and held == theirs["shape"]["quantization"]
    for side in (ours, theirs):
        assert sum(side["components"].values()) == pytest.approx(1.0)
        assert {"recurrent", "attention", "mlp", "norms", "head and loss", "optimiser"} <= set(side["components"])


def install(monkeypatch: pytest.MonkeyPatch, module_name: str, function: Callable[..., Any]) -> None:
    """Make `module_name` importable, with `function` in it, which answers as if it had been written there."""
    parts = module_name.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    inside = vars(sys.modules[module_name])
    inside["function"] = function
    names = ", ".join(inspect.signature(function).parameters)
    exec(f"def {function.__name__}({names}): return function({names})", inside)


def test_called_are_the_packages_whose_functions_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that transformers' function took is named with its version; one that it did not find is missed."""

    def mamba_chunk_scan_combined(x: float) -> float:
        return 2 * x

    def own_scan(x: float) -> float:
        return 3 * x

    taken = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")
    assert called_operations(lambda: taken(own_scan)(1.0)) == "transformers' own, without mamba_ssm"
    install(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined)
    kernel = taken(own_scan)
    assert kernel(1.0) == 2.0
    assert called_operations(lambda: kernel(1.0)) == "mamba_ssm of unknown version"
    facts = tmp_path / "mamba_ssm-9.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mamba_ssm\nVersion: 9.9\n")
    (facts / "top_level.txt").write_text("mamba_ssm\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert called_operations(lambda: kernel(1.0)) == "mamba_ssm 9.9"
    convolution = use_kernel_func_from_hub_with_fallback("causal_conv1d_fn", "causal_conv1d")(own_scan)
    both = called_operations(lambda: convolution(kernel(1.0)))
    assert both == "mamba_ssm 9.9; transformers' own own_scan, without causal_conv1d"
    # What a layer asks first, and what answers None without a kernel, is not what it ran on.
    whole = use_kernel_func_from_hub_with_fallback("mamba_inner_fn", "causal_conv1d")(lambda x: None)
    assert called_operations(lambda: whole(kernel(1.0))) == "mamba_ssm 9.9"
    # Installed and not called.
    assert called_operations(lambda: None) == "transformers' own"
    # Of ours an operation counts, and not what one on kernels takes from the reference.
    x, taps, window = torch.zeros(1, 2, 4), torch.zeros(2, 3), torch.zeros(1, 2, 2)
    assert called_operations(lambda: causal_conv1d(x, taps)) == "ssmtune's causal_conv1d (reference)"
    assert called_operations(lambda: check_window(window, 3)) == "transformers' own"
    assert called_operations(lambda: causal_conv1d(kernel(x), taps)).startswith(
        "mamba_ssm 9.9; ssmtune's causal_conv1d"
    )


@pytest.mark.parametrize(
    ("quantize", "is_fused"),
    [(None, True), (QuantizeConfig(), True), (QuantizeConfig(components=("recurrent",)), False)],
)
def test_the_peer_runs_on_kernels_that_are_installed(
    quantize: QuantizeConfig | None, is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused layer reads out_proj past its adapter; where that matrix is in 4 bits, the peer goes without it."""
    scan, convolve = modeling.mamba2_chunk_scan, modeling.causal_conv1d_fn

    def mamba_split_conv1d_scan_combined(
        zxbcdt: torch.Tensor,
        conv1d_weight: torch.Tensor,
        conv1d_bias: torch.Tensor,
        dt_bias: torch.Tensor,
        A: torch.Tensor,
        D: torch.Tensor,
        chunk_size: int,
        rmsnorm_weight: torch.Tensor,
        rmsnorm_eps: float,
        outproj_weight: torch.Tensor,
    ) -> torch.Tensor:
        batch, length, _ = zxbcdt.shape
        z, x, dt = zxbcdt.split([64, 96, 8], dim=-1)
        x, B, C = convolve(x.mT, conv1d_weight, conv1d_bias, activation="silu").mT.split([64, 16, 16], dim=-1)
        x, B, C = (part.reshape(batch, length, heads, -1) for part, heads in ((x, 8), (B, 1), (C, 1)))
        y = scan(x, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)
        y = y.reshape(batch, length, -1) * torch.nn.functional.silu(z)
        y = torch.nn.functional.rms_norm(y, (64,), rmsnorm_weight, rmsnorm_eps)
        return torch.nn.functional.linear(y, outproj_weight)

    config = micro_bench(tmp_path, quantize=quantize)
    plain = measure(config, "transformers+peft")
    install(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_split_conv1d_scan_combined)
    take = use_kernel_func_from_hub_with_fallback("mamba_split_conv1d_scan_combined", "mamba_ssm")
    fused = take(modeling.mamba2_split_conv1d_scan_combined)
    monkeypatch.setattr(modeling, "mamba2_split_conv1d_scan_combined", fused)
    theirs = measure(config, "transformers+peft")
    assert theirs["first_loss"] == pytest.approx(plain["first_loss"], rel=LOSS_LIMITS["float32"])
    if is_fused:
        assert theirs["operations"].startswith("mamba_ssm of unknown version")
        assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in theirs["dead"]} == {"out_proj"}
    else:
        assert theirs["operations"] == plain["operations"]
        assert theirs["dead"] == []


def test_the_peer_leaves_out_what_peft_refuses(tmp_path: Path) -> None:
    """PEFT takes no LoRA on the output projection of some recurrent layers; what it does take is measured and counted."""
    path = tmp_path / "mamba2.json"
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1}
    path.write_text(json.dumps(Mamba2Config(**sizes, num_hidden_layers=2).to_dict()))
    config = BenchConfig(model=str(path), rank=2, tokens_per_step=16, row_length=16, num_steps=1, repeats=1)
    ours, theirs = measure(config, "ssmtune"), measure(config, "transformers+peft")
    assert ours["num_trained"] - theirs["num_trained"] == 2 * 2
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)


def test_time_goes_to_the_component_that_spends_it() -> None:
    """A slow module's forward and backward both count for it; what runs outside of modules is the rest."""

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x * 1.0

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            time.sleep(0.05)
            return dy * 1.0

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Slow.apply(x)  # type: ignore[no-any-return,no-untyped-call]

    slow, quick = Layer(), torch.nn.Linear(3, 3)

    def step() -> None:
        quick(slow(torch.ones(2, 3, requires_grad=True))).sum().backward()

    shares, kernels = profile_step(step, [(slow, "recurrent"), (quick, "mlp")], with_cuda=False)
    assert shares["recurrent"] > 0.8
    assert "mlp" in shares
    slowest = {kernel["name"]: kernel for kernel in kernels["slowest"]}
    assert slowest["aten::addmm"]["kind"] == "matrix products" and slowest["aten::addmm"]["count"] == 1
    # The sleep is no operation of torch's, so that the kernels add up to less than the step.
    total = sum(kernels["kinds"].values())
    assert total == pytest.approx(sum(kernel["ms"] for kernel in kernels["slowest"])) and total < 50


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("add_low_rank_kernel", "matrix products"),
        ("_chunk_scan_fwd_kernel", "scan"),
        ("through_states_kernel", "scan"),
        ("entering_kernel", "scan"),
        ("leaving_kernel", "scan"),
        ("delta_reads_back_kernel", "scan"),
        ("gradient_kernel", "convolution"),
        ("backward_kernel", "convolution"),
        ("rolling_conv_kernel", "convolution"),
        ("rolling_conv_back_kernel", "convolution"),
        ("void causal_conv1d_fwd_kernel<Causal_conv1d_fwd_kernel_traits<128, 4>>", "convolution"),
        ("norm_back_kernel", "norm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, BinaryFunctor>", "elementwise and sums"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<>", "loss"),
        ("activate_back_kernel", "gate and activation"),
        ("mystery", "other"),
    ],
)
def test_a_kernel_is_sorted_by_its_name(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_a_transformer_can_be_measured_too(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(LlamaConfig(**MICRO, intermediate_size=24).to_dict()))
    config = BenchConfig(
        model=str(path), recipe="all", rank=2, tokens_per_step=16, row_length=16, num_steps=1, repeats=1
    )
    assert measure(config, "ssmtune")["dead"] == []
