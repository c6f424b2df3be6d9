"""The Triton kernels' logic in Triton's interpreter, against the step-by-step recurrence in fp64: outputs and all gradients.

The interpreter runs on a CPU and knows no tensor cores; what those round is measured on a GPU (benchmarks/operations.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tolerances import BF16_ROUND_ONCE, OP_FP32, relative_rms

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from ssmtune.ops import backend
from ssmtune.ops.causal_conv1d import causal_conv1d
from ssmtune.ops.gated_rms_norm import gated_rms_norm
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan, mamba2_recurrence, stages
from ssmtune.ops.mamba2_chunk_scan import triton as scan_kernels

Tensors = dict[str, torch.Tensor]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture
def chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a short sequence: the interpreter needs seconds for what a GPU does in microseconds."""
    monkeypatch.setattr(stages, "CHUNK", 16)


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scan_inputs(batch: int, steps: int, width: int, groups: int, state: int, *, initial: bool) -> Tensors:
    g = torch.Generator().manual_seed(0)
    heads = 2
    tensors = {
        "x_BTHP": normal(g, batch, steps, heads, width),
        "dt_BTH": normal(g, batch, steps, heads),
        "A_H": -torch.exp(torch.linspace(-3, 2, heads, dtype=torch.float64)),
        "B_BTGN": normal(g, batch, steps, groups, state),
        "C_BTGN": normal(g, batch, steps, groups, state),
        "D_H": normal(g, heads),
        "dt_bias_H": normal(g, heads) - 2.0,
    }
    if initial:
        tensors["initial_states_BHPN"] = normal(g, batch, heads, width, state)
    return tensors


def with_gradients(
    run: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, upstream: torch.dtype, **options: Any
) -> Tensors:
    """Outputs and the gradient of every input under one fixed upstream gradient, rounded once to `upstream`."""
    leaves = {name: value.to(dtype).clone().requires_grad_() for name, value in tensors.items()}
    outputs = run(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(99)
    given = [normal(g, *o.shape).to(upstream).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return named | {f"grad {name}": value for name, value in zip(leaves, gradients, strict=True)}


def errors(
    ours: Callable[..., Any], truth: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, **options: Any
) -> dict[str, float]:
    """Relative RMS error by tensor; both sides get inputs that `dtype` holds exactly."""
    rounded = {name: value.to(dtype).double() for name, value in tensors.items()}
    expected = with_gradients(truth, rounded, torch.float64, dtype, **options)
    found = with_gradients(ours, rounded, dtype, dtype, **options)
    return {name: relative_rms(found[name], expected[name]) for name in expected}


def documents(batch: int, steps: int) -> torch.Tensor:
    """Another split in each row: single steps, inside a chunk, and at the edge of one of 16."""
    numbers = torch.zeros(batch, steps, dtype=torch.int32)
    for row in range(batch):
        for start in (1, 2, 7, 16, 33):
            numbers[row, start + row :] += 1
    return numbers


def padding(batch: int, steps: int) -> torch.Tensor:
    mask = torch.ones(batch, steps, dtype=torch.long)
    mask[0, : steps // 3] = 0
    return mask


def scan(**arguments: Any) -> Any:
    return mamba2_chunk_scan(**arguments, backend="triton")


@pytest.mark.usefixtures("chunks_of_16")
@pytest.mark.parametrize(
    ("size", "initial", "packed", "padded"),
    [
        ((1, 1, 3, 1, 5), False, False, False),
        ((1, 37, 3, 1, 5), True, False, False),
        ((1, 37, 5, 2, 40), True, True, True),
    ],
    ids=["one-step", "from-state", "packed-padded-groups"],
)
def test_scan_is_the_recurrence(size: tuple[int, ...], initial: bool, packed: bool, padded: bool) -> None:
    batch, steps = size[:2]
    options: dict[str, Any] = {"dt_softplus": True, "dt_limit": (0.05, 1.5) if padded else (0.0, math.inf)}
    options |= {"seq_idx": documents(batch, steps)} if packed else {}
    options |= {"padding_mask": padding(batch, steps)} if padded else {}
    found = errors(scan, mamba2_recurrence, scan_inputs(*size, initial=initial), torch.float32, **options)
    assert max(found.values()) <= OP_FP32, found


@pytest.mark.usefixtures("chunks_of_16")
def test_scan_rounds_bf16_once() -> None:
    tensors = scan_inputs(1, 21, 4, 1, 6, initial=False)
    small = ("A_H", "D_H", "dt_bias_H")
    held = {name: value.to(torch.float32 if name in small else torch.bfloat16) for name, value in tensors.items()}

    def mixed(**leaves: Any) -> Any:
        return scan(**{name: leaf.to(held[name].dtype) for name, leaf in leaves.items()}, dt_softplus=True)

    def truth(**leaves: Any) -> Any:
        return mamba2_recurrence(**leaves, dt_softplus=True)

    exact = {name: value.double() for name, value in held.items()}
    expected = with_gradients(truth, exact, torch.float64, torch.bfloat16)
    found = with_gradients(mixed, exact, torch.float64, torch.bfloat16)
    assert max(relative_rms(found[name], expected[name]) for name in expected) <= BF16_ROUND_ONCE


@pytest.mark.usefixtures("chunks_of_16")
def test_a_wrong_decay_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of the tests above is far below what a planted fault costs."""
    tensors = scan_inputs(1, 21, 3, 1, 5, initial=False)
    assert max(errors(scan, mamba2_recurrence, tensors, torch.float32, dt_softplus=True).values()) <= OP_FP32
    genuine = scan_kernels.step_sizes

    def off_by_one(*arguments: Any) -> Any:
        step, decay = genuine(*arguments)
        return step, decay.roll(1, dims=-1)

    monkeypatch.setattr(scan_kernels, "step_sizes", off_by_one)
    assert errors(scan, mamba2_recurrence, tensors, torch.float32, dt_softplus=True)["output 0"] > 1e-3


@pytest.mark.parametrize("layout", ["strided", "dense"])
@pytest.mark.parametrize("window", [False, True], ids=["from-zero", "from-window"])
@pytest.mark.parametrize(("packed", "padded", "bias"), [(False, False, True), (True, True, True), (True, False, False)])
def test_convolution_is_the_reference(layout: str, packed: bool, padded: bool, bias: bool, window: bool) -> None:
    """The second row's first document is two steps long: shorter than the window, which may not reach into the next."""
    batch, steps, channels = 2, 37, 21
    g = torch.Generator().manual_seed(0)
    tensors = {"x": normal(g, batch, steps, channels + 8), "weight": normal(g, channels, 4)}
    tensors |= {"bias": normal(g, channels)} if bias else {}
    tensors |= {"initial_state_BCK": normal(g, batch, channels, 3)} if window else {}
    options: dict[str, Any] = {"seq_idx": documents(batch, steps)} if packed else {}
    # Without a window the mask is shorter than the row; with one, padding stands between the window's place and the row's.
    options |= {"padding_mask": padding(batch, steps if window else steps - 2)} if padded else {}

    def run(x: Any, weight: Any, bias: Any = None, *, which: Any = "triton", **options: Any) -> Any:
        view = x[..., 3:-5].transpose(1, 2)
        view = view if layout == "strided" else view.contiguous()
        return causal_conv1d(view, weight, bias, None if window and packed else "silu", backend=which, **options)

    def truth(**arguments: Any) -> Any:
        return run(**arguments, which="reference")

    found = errors(run, truth, tensors, torch.float32, **options)
    assert max(found.values()) <= OP_FP32, found


@pytest.mark.parametrize(("steps", "taps", "num_padded"), [(1, 4, 0), (2, 8, 1), (5, 3, 5)])
def test_a_window_longer_than_the_sequence(steps: int, taps: int, num_padded: int) -> None:
    """Fewer steps than taps, and a row of padding alone."""
    g = torch.Generator().manual_seed(0)
    tensors = {"x_BCT": normal(g, 2, 5, steps), "weight_CK": normal(g, 5, taps)}
    tensors["initial_state_BCK"] = normal(g, 1, 5, taps - 1).expand(2, -1, -1)
    mask = torch.ones(2, steps)
    mask[0, :num_padded] = 0
    options: dict[str, Any] = {"activation": "silu", "padding_mask": mask if num_padded else None}
    found = errors(
        partial(causal_conv1d, backend="triton"),
        partial(causal_conv1d, backend="reference"),
        tensors,
        torch.float32,
        **options,
    )
    assert max(found.values()) <= OP_FP32, found


def test_convolution_reads_and_writes_the_layout_of_its_input() -> None:
    """A slice of a projection's output stays where it is, and the result is as contiguous as a later split needs."""
    x = torch.randn(1, 9, 40)[..., 8:24].transpose(1, 2)
    y = causal_conv1d(x, torch.randn(16, 4), None, "silu", backend="triton")
    assert y.shape == x.shape and y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("group_size", [21, 7])
def test_norm_is_the_reference(gated: bool, group_size: int) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {"wide": normal(g, 2, 5, 60), "weight": normal(g, 21)}

    def run(wide: Any, weight: Any, which: Any = "triton") -> Any:
        gate = wide[..., 30:51] if gated else None
        return gated_rms_norm(wide[..., 3:24], weight, gate, eps=1e-3, group_size=group_size, backend=which)

    found = errors(run, lambda **t: run(**t, which="reference"), tensors, torch.float32)
    assert max(found.values()) <= OP_FP32, found


def test_norm_reference_is_the_models_own() -> None:
    """The reference meets transformers' gated norm, in fp64."""
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

    g = torch.Generator().manual_seed(0)
    x, gate = normal(g, 3, 12).float(), normal(g, 3, 12).float()
    norm = GraniteMoeHybridRMSNormGated(12, group_size=6, eps=1e-3)
    norm.weight.data = normal(g, 12).float()
    found = gated_rms_norm(x, norm.weight, gate, eps=1e-3, group_size=6)
    assert relative_rms(found.detach(), norm(x, gate).detach()) <= OP_FP32


def test_choice_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert backend.choose("mamba2_chunk_scan", x).reason == "runs on cpu"
    assert backend.choose("mamba2_chunk_scan", x, "reference").reason == "asked for"
    assert {choice.name for choice in backend.backends("cpu").values()} == {"reference"}
    assert backend.backends("cuda")["causal_conv1d"].name == "triton"
    monkeypatch.setenv(backend.SWITCH, "reference")
    assert backend.backends("cuda")["causal_conv1d"].reason == "SSMTUNE_OPS=reference"
    monkeypatch.delenv(backend.SWITCH)
    bad = {"causal_conv1d": (((0,), (99,), "a planted fault"),)}
    monkeypatch.setattr(backend, "KNOWN_BAD", bad)
    assert "a planted fault" in backend.backends("cuda")["causal_conv1d"].reason


@pytest.mark.parametrize(("version", "tried"), [("3.5.1", False), ("3.6.0", True), ("3.6.9", True), ("3.7.0", False)])
def test_what_other_compilers_may_get_wrong_runs_on_those_tried(
    version: str, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_version", lambda: version)
    monkeypatch.setattr(backend, "_version_numbers", lambda: tuple(map(int, version.split("."))))
    found = backend.backends("cuda")
    assert found["mamba2_chunk_scan"].name == "triton"
    assert found["gated_delta_rule"].name == ("triton" if tried else "reference")
    assert (
        tried
        or found["gated_delta_rule"].reason == f"Triton {version}: its kernels have been tried with Triton 3.6 only"
    )


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    from ssmtune.errors import ConfigError

    tensors = scan_inputs(1, 3, 3, 1, 5, initial=False)
    with pytest.raises(ConfigError, match="float64"):
        mamba2_chunk_scan(**tensors, backend="triton")
    with pytest.raises(ConfigError, match="holds 2 inputs; a convolution of 4 taps needs 3"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(2, 4), initial_state_BCK=torch.zeros(1, 2, 2), backend="triton")
