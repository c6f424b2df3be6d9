"""The convolution's kernels in Triton's interpreter where a program's segment ends, in each layout, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import Tensors, documents
from tolerances import BF16_ROUND_ONCE, OP_FP32, relative_rms

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from ssmtune.ops.causal_conv1d import causal_conv1d, kernels, rolling_back_kernels, rolling_kernels
from ssmtune.ops.causal_conv1d import stages as ours
from ssmtune.ops.causal_conv1d.cases import cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")

SEGMENT = 8
"""Steps of a program, forward and, with 4 taps, on the way back; `BACK` are then the steps that it walks over."""
BACK = 12

ROLLING = {rolling_kernels.rolling_conv_kernel, rolling_back_kernels.rolling_conv_back_kernel}
TILES = {kernels.forward_kernel, kernels.gradient_kernel, kernels.backward_kernel}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Several segments and blocks of channels in small tensors."""
    monkeypatch.setattr(ours, "FORWARD", ours.FORWARD | {"STEPS": SEGMENT, "BLOCK_C": 4})
    monkeypatch.setattr(ours, "BACKWARD", ours.BACKWARD | {"STEPS": BACK, "BLOCK_C": 4})


def inputs(num_steps: int, *, taps: int = 4, channels: int = 3, batch: int = 1) -> Tensors:
    """Inputs that fp32 holds exactly; the convolution is over some of the channels of a wider tensor."""
    g = torch.Generator().manual_seed(num_steps)
    shapes = {"wide": (batch, num_steps, channels + 5), "weight": (channels, taps), "bias": (channels,)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def with_gradients(tensors: Tensors, dtype: torch.dtype, which: Any, layout: str, **options: Any) -> Tensors:
    """Output and every gradient, under an upstream gradient that bf16 holds exactly."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}
    x = leaves["wide"][..., 3:-2].transpose(1, 2)
    x = x if layout == "channels last" else x.contiguous()
    y = causal_conv1d(x, leaves["weight"], leaves.get("bias"), backend=which, **{"activation": "silu", **options})
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"output": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(
    tensors: Tensors,
    *,
    dtype: torch.dtype = torch.float32,
    limit: float = OP_FP32,
    layout: str = "channels last",
    **options: Any,
) -> None:
    """The kernels in `dtype` within `limit` of the reference in fp64."""
    rounded = {name: value.to(dtype) for name, value in tensors.items()}
    truth = with_gradients(rounded, torch.float64, "reference", layout, **options)
    found = with_gradients(rounded, dtype, "triton", layout, **options)
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 8, 9, 10, 11, 12, 13])
def test_lengths_around_the_end_of_a_segment(num_steps: int) -> None:
    """Also of the segments on the way back, which end a step later, and of the walk over one.

    What one row would write behind its end is the next one's beginning.
    """
    check(inputs(num_steps, batch=2 if num_steps in (7, 13) else 1))


@pytest.mark.parametrize("starts", [(5,), (6,), (7,), (8,), (9,), (10,), (6, 8, 9, 12)])
def test_documents_around_the_end_of_a_segment(starts: tuple[int, ...]) -> None:
    check(inputs(14), seq_idx=documents(14, *starts)[:1])


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fewer_taps(taps: int) -> None:
    """The segments on the way back are longer by a step for each."""
    check(inputs(13, taps=taps), seq_idx=documents(13, 7, 10)[:1])


@pytest.mark.parametrize(("activation", "window"), [("silu", True), (None, False), (None, True)])
def test_padding_up_to_the_end_of_a_segment(activation: str | None, window: bool) -> None:
    """Outputs that read the window lie on both sides of that end; without one there is no bias either."""
    tensors = inputs(14)
    if not window:
        del tensors["bias"]
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, :SEGMENT], mask[0, 12] = 0, 0
    options = {"initial_state_BCK": torch.linspace(-1, 1, 9).view(1, 3, 3)} if window else {}
    check(tensors, padding_mask=mask, activation=activation, **options)


@pytest.mark.parametrize(
    ("layout", "taps", "expected"),
    [("channels last", 4, ROLLING), ("channels last", 5, TILES), ("time last", 4, TILES)],
)
def test_layouts_and_taps_choose_the_kernels(
    layout: str, taps: int, expected: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of channels, and rows whose documents begin at different steps."""
    seen = set()
    genuine = ours.launch

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        seen.add(kernel)
        genuine(kernel, *arguments, **options)

    monkeypatch.setattr(ours, "launch", launch)
    check(inputs(13, taps=taps, channels=6, batch=2), layout=layout, seq_idx=documents(13, 8))
    assert seen == expected


def test_the_cases_for_a_device_are_of_both_layouts() -> None:
    given = [case.inputs["x"].clone() for case in cases() if case.operation == "causal_conv1d"]
    assert {x.stride(1) == 1 for x in given} == {True, False}


def test_bf16_is_rounded_once() -> None:
    """The interpreter cuts off what a GPU rounds, which is off by twice as much."""
    check(inputs(11), dtype=torch.bfloat16, limit=2 * BF16_ROUND_ONCE)


def test_a_gradient_without_strides() -> None:
    """The gradient of a sum is one number seen from everywhere."""
    gradients = []
    for which in ("triton", "reference"):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs(11).items()}
        x = leaves["wide"][..., :3].transpose(1, 2)
        y = causal_conv1d(x, leaves["weight"], leaves["bias"], "silu", backend=which)  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(y.sum(), list(leaves.values())))
    assert max(relative_rms(a, b) for a, b in zip(*gradients, strict=True)) <= OP_FP32


@pytest.mark.parametrize("num_steps", [7, 13])
def test_nothing_is_written_beside_the_gradient(num_steps: int) -> None:
    """It goes into a view of a wider one, whose other channels and steps stay as they are."""
    t = inputs(num_steps, batch=2)
    x, dy = t["wide"][..., 3:-2].transpose(1, 2), torch.randn(2, num_steps, 3).transpose(1, 2)
    wider = torch.full((2, num_steps + 8, 8), 7.0)
    into = wider[:, 4:-4, 3:-2].transpose(1, 2)
    ours.run_backward(dy, x, t["weight"], t["bias"], silu=True, seq=None, into=into, trains=True)
    assert bool((into != 7.0).all())
    into.fill_(7.0)
    assert bool((wider == 7.0).all())


def test_what_is_not_finite_goes_no_further() -> None:
    """Not into the next document, not from padding, not from the channels beside the convolution's."""
    clean, start = inputs(14), 9
    wide = clean["wide"].clone()
    wide[:, :start], wide[..., :3], wide[..., -2:], wide[:, 12] = (torch.nan,) * 4
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, 12] = 0
    options: dict[str, Any] = {"seq_idx": documents(14, start)[:1], "padding_mask": mask}
    found, truth = (
        with_gradients(clean | {"wide": x}, torch.float32, "triton", "channels last", **options)
        for x in (wide, clean["wide"])
    )
    assert torch.equal(found["output"][..., start:], truth["output"][..., start:])
    assert torch.equal(found["gradient of wide"][:, start:], truth["gradient of wide"][:, start:])
