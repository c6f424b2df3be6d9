"""The kernels of the rewritten layers in Triton's interpreter, against formulas in fp64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import OP_FP32, relative_rms
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from ssmtune.errors import ConfigError
from ssmtune.ops.case import Tensors, draw
from ssmtune.ops.gated_mlp import cases as mlp_cases
from ssmtune.ops.gated_mlp import triton as mlp_kernels
from ssmtune.ops.linear_cross_entropy import cases as loss_cases
from ssmtune.ops.linear_cross_entropy import linear_cross_entropy
from ssmtune.ops.linear_cross_entropy import triton as loss_kernels
from ssmtune.ops.mamba2_chunk_scan import stages
from ssmtune.ops.mamba2_conv_scan import cases as conv_scan_cases
from ssmtune.ops.mamba2_mixer import cases as mixer_cases
from ssmtune.ops.projection import LowRank, Packed, projection
from ssmtune.ops.projection import before as projection_kernels
from ssmtune.ops.projection import cases as projection_cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")

Run = Callable[[Tensors], torch.Tensor]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Small chunks and shares."""
    monkeypatch.setattr(stages, "CHUNK", 16)
    monkeypatch.setattr(loss_kernels, "LOGITS_BYTES", 4 * 37 * 4)
    monkeypatch.setattr(loss_kernels, "BLOCK", {"BLOCK": 16, "num_warps": 1})
    monkeypatch.setattr(projection_kernels, "BLOCK", {"BLOCK": 16, "num_warps": 1})
    for blocks in ("FORWARD", "BACK"):
        monkeypatch.setattr(mlp_kernels, blocks, {"BLOCK_T": 16, "BLOCK_K": 16, "STAGES": 1, "num_warps": 1})
    monkeypatch.setattr(mlp_kernels, "SHARES", 2)


def with_gradients(run: Run, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The output, and every gradient that exists under a fixed random loss."""
    leaves = {
        name: value.to(dtype).clone().requires_grad_() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    output = run(leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(output, list(asked.values()), upstream.to(output.dtype), allow_unused=True)
    gradients = {f"gradient of {n}": g for n, g in zip(asked, found, strict=True) if g is not None}
    return {"output": output.detach()} | gradients


def check(run: Run, truth: Run, tensors: Tensors) -> None:
    """fp32 within the limit of an fp32 operation, in the output and every gradient; the same gradients exist."""
    found, exact = with_gradients(run, tensors, torch.float32), with_gradients(truth, tensors, torch.float64)
    assert found.keys() == exact.keys()
    errors = {name: relative_rms(found[name], exact[name]) for name in exact}
    assert max(errors.values()) <= OP_FP32, errors


PROJECTIONS = {case.label: case for case in projection_cases.cases()}
KINDS = {
    "behind a norm": "norm",
    "behind a gated norm in groups, residual": "norm",
    "behind two halves": "halves",
    "behind silu with up": "silu",
    "behind relu2": "relu2",
    "frozen, behind a norm, bias and residual": "norm",
}


@pytest.mark.parametrize("label", PROJECTIONS)
def test_projection(label: str) -> None:
    kind = KINDS.get(label, "none")
    check(
        lambda t: projection_cases.run(t, kind, backend="triton"),
        lambda t: projection_cases.truth(t, kind),
        PROJECTIONS[label].inputs,
    )


def test_projection_reads_slices() -> None:
    """A gate and an input that are slices of a wider tensor give what copies of them give."""
    t = PROJECTIONS["behind a gated norm in groups, residual"].inputs
    wide = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def sliced(t: Tensors) -> Tensors:
        return t | {"x": t["wide"][..., 3:27], "second": t["wide"][..., 30:54]}

    given = {name: value for name, value in t.items() if name not in ("x", "second")} | {"wide": wide}
    check(
        lambda t: projection_cases.run(sliced(t), "norm", backend="triton"),
        lambda t: projection_cases.truth(sliced(t), "norm"),
        given,
    )


def test_dropout_of_the_low_rank_input() -> None:
    """A share of the elements is dropped, the others are scaled up; forward and backward drop the same ones."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(64, 24, generator=g, requires_grad=True)
    A, B = (torch.randn(s, generator=g, requires_grad=True) for s in ((3, 24), (17, 3)))
    weight = torch.zeros(17, 24)
    torch.manual_seed(11)
    y = projection(x, weight, low_rank=LowRank(A, B, 1.0, dropout=0.25), backend="triton")
    # What was dropped is read off the gradients of single elements: y = (x * kept) A^T B^T.
    upstream = torch.randn(y.shape, generator=g)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), upstream)
    kept = dx / (upstream @ B @ A)
    values = kept.detach().round(decimals=4).unique()
    assert torch.allclose(values, torch.tensor([0.0, 4 / 3]), atol=1e-3)
    # 1,536 elements: 5 standard deviations of the share are 0.055.
    assert abs(float((kept == 0).double().mean()) - 0.25) < 0.055
    v = (x * kept) @ A.T
    assert relative_rms(y.detach(), (v @ B.T).detach()) <= OP_FP32
    assert relative_rms(dA, ((upstream @ B).T @ (x * kept)).detach()) <= OP_FP32
    assert relative_rms(dB, (upstream.T @ v).detach()) <= OP_FP32
    torch.manual_seed(11)
    again = projection(x, weight, low_rank=LowRank(A, B, 1.0, dropout=0.25), backend="triton")
    assert torch.equal(again, y)


@pytest.mark.parametrize("case", loss_cases.cases(), ids=lambda case: case.label)
def test_loss(case: loss_cases.Case) -> None:
    check(
        lambda t: linear_cross_entropy(t["hidden"], t["weight"].detach(), t["targets"], backend="triton"),
        lambda t: case.truth(t)["loss"],
        case.inputs,
    )


@pytest.mark.parametrize("vocab", [37, 40])
def test_products_of_an_odd_vocabulary_are_of_a_padded_weight(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """The GPU's products are several times slower otherwise; a weight that needs no rows is not copied."""
    launch, multiply = loss_kernels.launch, torch.mm
    kernels, products, copies = set(), set(), set()
    hidden, targets = (loss_cases.cases()[1].inputs[name] for name in ("hidden", "targets"))
    weight = draw(torch.Generator().manual_seed(4), vocab, 12).float()

    def watch(
        kernel: Any, grid: Any, logits: torch.Tensor, targets: Any, losses: Any, *sizes: int, **options: Any
    ) -> None:
        kernels.add((*sizes, logits.is_contiguous()))
        launch(kernel, grid, logits, targets, losses, *sizes, **options)

    def watch_product(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        products.add((a.shape[1], b.shape[1]))
        copies.add(b.data_ptr() != weight.data_ptr())
        return multiply(a, b, **options)

    monkeypatch.setattr(loss_kernels, "launch", watch)
    monkeypatch.setattr(torch, "mm", watch_product)
    linear_cross_entropy(hidden.float().requires_grad_(), weight, targets, backend="triton")
    assert kernels == {(vocab, 40, True)} and products == {(12, 40), (40, 12)} and copies == {vocab != 40}


def test_a_mean_over_targets_is_not_rounded_as_a_factor() -> None:
    """In bf16 a factor can be off by 2^-8, for every gradient of a step alike: no rounding that averages out."""
    generator, gradients = torch.Generator().manual_seed(3), []
    rows, weight = draw(generator, 64, 12).bfloat16(), draw(generator, 37, 12).bfloat16()
    targets = torch.randint(37, (64,), generator=generator)
    for factor in (1.0, 1 / 8100):
        hidden = rows.clone().requires_grad_()
        (linear_cross_entropy(hidden, weight, targets, backend="triton") * factor).backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad.double())
    whole, mean = gradients
    scale = 8100 * (whole * mean).sum() / whole.square().sum()
    # What the gradients' own roundings leave of it after hundreds of them.
    assert abs(scale - 1) < 2**-11


def test_loss_of_large_logits() -> None:
    """Logits far above what exp can take, and blocks that hold none of a row's."""
    hidden = torch.tensor([[300.0, -200.0], [-300.0, 5.0]])
    weight = torch.randn(37, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 36])
    loss = linear_cross_entropy(hidden, weight, targets, backend="triton")
    truth = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert relative_rms(loss, truth) <= OP_FP32


@pytest.mark.parametrize("case", conv_scan_cases.cases(), ids=lambda case: case.label)
def test_conv_scan(case: conv_scan_cases.Case) -> None:
    limit = (0.01, 1.5)
    check(
        lambda t: conv_scan_cases.run(t, dt_limit=limit, backend="triton"),
        lambda t: conv_scan_cases.truth(t, limit),
        case.inputs,
    )


@pytest.mark.parametrize("highest_rank", [0, 32])
def test_gated_mlp(monkeypatch: pytest.MonkeyPatch, highest_rank: int) -> None:
    """With the factors' gradients summed tile by tile, the last share of the rows partly beyond them, and by products."""
    monkeypatch.setattr(mlp_kernels, "MAX_SUMMED_RANK", highest_rank)
    x = draw(torch.Generator().manual_seed(1), 1, 41, mlp_cases.WIDTH)
    inputs = mlp_cases.cases()[0].inputs | {"x": x}
    check(lambda t: mlp_cases.run(t, backend="triton"), mlp_cases.truth, inputs)


@pytest.mark.parametrize("case", mlp_cases.cases(), ids=lambda case: case.label)
def test_gated_mlp_as_two_projections(case: mlp_cases.Case) -> None:
    """Where its own kernels cannot serve, the MLP is two projections, and says so when its kernels are asked for."""
    check(lambda t: mlp_cases.run(t), mlp_cases.truth, case.inputs)
    if case.label != "adapted":
        with pytest.raises(ConfigError, match="has no low-rank term"):
            mlp_cases.run({name: value.float() for name, value in case.inputs.items()}, backend="triton")


def test_rounded_factors_are_what_they_round() -> None:
    """Factors that were rounded in advance give what the factors themselves give, gradients included."""
    t = PROJECTIONS["adapted, residual"].inputs

    def run(t: Tensors, dtype: torch.dtype | None) -> torch.Tensor:
        rounded = None if dtype is None else (t["A"].detach().to(dtype), (0.7 * t["B"].detach()).to(dtype))
        low_rank = LowRank(t["A"], t["B"], 0.7, rounded=rounded)
        return projection(t["x"], t["weight"].detach(), low_rank=low_rank, residual=t["residual"], backend="triton")

    # Those that were rounded to another dtype than that of the products are not used.
    found, other, expected = (
        with_gradients(lambda t, dtype=dtype: run(t, dtype), t, torch.float32)  # type: ignore[misc]
        for dtype in (torch.float32, torch.bfloat16, None)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(other[name], expected[name]) for name in expected)


MIXERS = {case.label: case for case in mixer_cases.cases()}


@pytest.mark.parametrize("label", [label for label in MIXERS if "frozen" not in label])
def test_mixer(label: str) -> None:
    residual = not label.startswith("without residual")
    check(
        lambda t: mixer_cases.run(t, residual, backend="triton"),
        lambda t: mixer_cases.truth(t, residual),
        MIXERS[label].inputs,
    )


def test_mixer_of_the_first_layer() -> None:
    """Embeddings ask for no gradient: the factors' gradients are the same without it."""
    tensors = MIXERS["adapted, 67 steps"].inputs
    first = {name: value for name, value in tensors.items() if name != "x"}
    x = tensors["x"].float()
    found = with_gradients(lambda t: mixer_cases.run(t | {"x": x}, True, backend="triton"), first, torch.float32)
    expected = with_gradients(lambda t: mixer_cases.run(t, True, backend="triton"), tensors, torch.float32)
    assert found.keys() == expected.keys() - {"gradient of x"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("label", MIXERS)
def test_mixer_as_its_operations(label: str) -> None:
    residual = not label.startswith("without residual")
    check(lambda t: mixer_cases.run(t, residual), lambda t: mixer_cases.truth(t, residual), MIXERS[label].inputs)
    if "frozen" in label:
        with pytest.raises(ConfigError, match="has no low-rank term"):
            mixer_cases.run({n: v.float() for n, v in MIXERS[label].inputs.items()}, residual, backend="triton")


class Codes:
    """Holds weights packed, and knows which of the values that they were unpacked to are still in memory."""

    def __init__(self) -> None:
        self.values: list[StorageWeakRef] = []

    def __call__(self, weight: torch.Tensor) -> Packed:
        def unpack() -> torch.Tensor:
            values = weight.detach().clone()
            self.values.append(StorageWeakRef(values.untyped_storage()))
            return values

        return Packed(unpack, tuple(weight.shape), weight.dtype)

    def num_alive(self) -> int:
        return sum(not values.expired() for values in self.values)


PACKED = {
    f"projection, {label}": (
        lambda t, label=label, **options: projection_cases.run(t, KINDS.get(label, "none"), **options),
        lambda t, label=label: projection_cases.truth(t, KINDS.get(label, "none")),
        PROJECTIONS[label].inputs,
    )
    for label in ("alone", "adapted, with bias", "frozen, behind a norm, bias and residual")
} | {
    "gated_mlp": (mlp_cases.run, mlp_cases.truth, mlp_cases.cases()[0].inputs),
    "mixer": (
        lambda t, **options: mixer_cases.run(t, True, **options),
        lambda t: mixer_cases.truth(t, True),
        MIXERS["adapted, 1 step"].inputs,
    ),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("label", PACKED)
def test_packed_weights(label: str, backend: str) -> None:
    """They give what the weights give; each is unpacked for a product at a time, and no values wait for the backward pass."""
    function, truth, tensors = PACKED[label]
    codes, unpacked_forward = Codes(), []

    def run(t: Tensors) -> torch.Tensor:
        output: torch.Tensor = function(t, hold=codes, backend=backend)
        assert codes.num_alive() == 0
        unpacked_forward.append(len(codes.values))
        return output

    check(run, truth, tensors)
    num_weights = sum(name.endswith("weight") for name in tensors)
    assert unpacked_forward == [num_weights]
    assert len(codes.values) == 2 * num_weights
    assert codes.num_alive() == 0
