"""The gated delta rule's kernels in Triton's interpreter, against the recurrence in fp64: outputs and all gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import op_checks
import pytest
import torch
from op_checks import Tensors
from tolerances import BF16_ROUND_ONCE, OP_FP32, relative_rms

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from triton.runtime import interpreter

from ssmtune.errors import ConfigError
from ssmtune.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrence, stages
from ssmtune.ops.gated_delta_rule import triton as kernels

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    pytest.mark.usefixtures("poisoned_memory"),
]

RULE = op_checks.Operation(
    function=partial(gated_delta_rule, backend="triton"),
    recurrence=gated_delta_rule_recurrence,
    state="initial_state_BHKV",
    options={"qk_l2norm": True},
)
HEADS, KEY, VALUE = 2, 20, 3


@pytest.fixture(autouse=True)
def _chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a short sequence: the interpreter needs seconds for what a GPU does in microseconds."""
    monkeypatch.setattr(stages, "CHUNK_EXACT", 16)


def inputs(num_steps: int, *, batch: int = 1, key_heads: int = 1, initial: bool = True) -> Tensors:
    """Decays from almost none to almost all of the state, beta between 0 and 2; heads of v share those of q and k."""
    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    tensors = {
        "q_BTHK": normal(batch, num_steps, key_heads, KEY),
        "k_BTHK": normal(batch, num_steps, key_heads, KEY),
        "v_BTHV": normal(batch, num_steps, HEADS, VALUE),
        "g": -torch.exp(1.5 * normal(batch, num_steps, HEADS) - 2),
        "beta_BTH": 2 * normal(batch, num_steps, HEADS).sigmoid(),
    }
    return tensors | ({"initial_state_BHKV": normal(batch, HEADS, KEY, VALUE)} if initial else {})


@pytest.mark.parametrize(("num_steps", "initial"), [(1, False), (16, True), (37, False)])
def test_the_kernels_are_the_recurrence(num_steps: int, initial: bool) -> None:
    op_checks.check_kernels(RULE, inputs(num_steps, initial=initial))


def test_documents_and_padding_of_a_batch() -> None:
    """Boundaries inside chunks, at their edges, and several in one; steps without a write at the end of a chunk."""
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :5], mask[1, 14:18] = 0, 0
    tensors = inputs(50, batch=2)
    op_checks.check_kernels(RULE, tensors, seq_idx=op_checks.documents(50, 5, 7, 15, 31), padding_mask=mask)


def test_a_head_of_keys_for_each_of_values_without_normalisation() -> None:
    tensors = inputs(20, key_heads=HEADS)
    tensors["k_BTHK"] /= 8  # as if normalised: longer keys let the state grow without bound
    op_checks.check_kernels(RULE, tensors, qk_l2norm=False, scale=0.7)


def test_a_decay_of_everything_stays_finite() -> None:
    tensors = inputs(37)
    tensors["g"][:, ::5] = -1e4
    op_checks.check_kernels(RULE, tensors)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_equal_keys_are_the_hardest_couplings_to_solve(strength: float) -> None:
    """Every step is coupled to every earlier one in full, without decay: powers of the couplings grow like binomials."""
    tensors = inputs(37)
    tensors["k_BTHK"][:] = tensors["k_BTHK"][:, :1]
    tensors["g"][:], tensors["beta_BTH"][:] = 0.0, strength
    op_checks.check_kernels(RULE, tensors)


def test_slices_of_one_projection_and_no_gradient_of_the_output() -> None:
    """As a layer hands them over; and a loss on the final state alone."""
    tensors = {name: value.float() for name, value in inputs(20).items()}
    names = ("q_BTHK", "k_BTHK", "v_BTHV")
    mixed = torch.cat([tensors[name].flatten(2) for name in names], dim=-1)

    def gradient(backend: Any) -> torch.Tensor:
        leaf = mixed.clone().requires_grad_()
        parts = leaf.split([KEY, KEY, HEADS * VALUE], dim=-1)
        given = {
            name: part.unflatten(-1, (-1, VALUE if name == "v_BTHV" else KEY))
            for name, part in zip(names, parts, strict=True)
        }
        _, final = gated_delta_rule(**{**tensors, **given}, qk_l2norm=True, backend=backend)
        return torch.autograd.grad(final.square().sum(), leaf)[0]

    # Two results in fp32, each within some roundings of the same gradient.
    assert relative_rms(gradient("triton"), gradient("reference").double()) <= 1e-5


def test_bf16_is_rounded_once_where_products_are_exact() -> None:
    wide = ("g", "initial_state_BHKV")
    narrow = {name: value.float() if name in wide else value.bfloat16() for name, value in inputs(20).items()}
    y, final = gated_delta_rule(**narrow, qk_l2norm=True, backend="triton")
    truth, _ = gated_delta_rule_recurrence(**{name: value.double() for name, value in narrow.items()}, qk_l2norm=True)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert relative_rms(y, truth) <= BF16_ROUND_ONCE


@pytest.mark.parametrize("lost", ["seq_idx", "padding_mask", "initial_state_BHKV"])
def test_a_lost_argument_would_be_seen(lost: str) -> None:
    options: dict[str, Any] = {
        "seq_idx": op_checks.documents(20, 6)[:1],
        "padding_mask": op_checks.padding(20, "left")[0][:1],
    }
    fault = op_checks.Operation(
        function=op_checks.without(RULE.function, lost),
        recurrence=RULE.recurrence,
        state=RULE.state,
        options=RULE.options,
    )
    with pytest.raises(AssertionError):
        op_checks.check_kernels(fault, inputs(20), limit=1e-3, **options)


def test_a_wrong_gradient_under_a_right_forward_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a miscompiled backward pass looks like: it takes a decay inside a chunk for none."""
    genuine = kernels.through_chunks

    def without_decay(*arguments: Any) -> stages.Chunks:
        found = genuine(*arguments)
        return replace(found, end=torch.ones_like(found.end))

    monkeypatch.setattr(kernels, "through_chunks", without_decay)
    truth, found = (
        op_checks.run_with_gradients(run, inputs(20), dtype, **RULE.options)
        for run, dtype in ((RULE.recurrence, torch.float64), (RULE.function, torch.float32))
    )
    errors = op_checks.errors(found, truth)
    assert errors["y"] <= OP_FP32 and errors["gradient of k_BTHK"] > 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"g": torch.zeros(1, 4, HEADS, KEY)}, "the decay differs by key channel"),
        ({"v_BTHV": torch.zeros(1, 4, HEADS, 130)}, "values 130 wide"),
        ({"q_BTHK": torch.zeros(1, 4, 1, KEY, dtype=torch.float64)}, "inputs are float64"),
    ],
)
def test_what_the_kernels_cannot_serve_says_why(change: Tensors, reason: str) -> None:
    tensors = {name: value.float() for name, value in inputs(4, initial=False).items()} | change
    with pytest.raises(ConfigError, match=reason):
        gated_delta_rule(**tensors, backend="triton")
    y, _ = gated_delta_rule(**tensors)
    assert y.isfinite().all()


def test_heads_that_do_not_divide_are_refused_as_by_the_reference() -> None:
    tensors = inputs(4, initial=False)
    tensors["q_BTHK"] = tensors["k_BTHK"] = torch.zeros(1, 4, 3, KEY)
    with pytest.raises(ConfigError, match="do not divide"):
        gated_delta_rule(**tensors, backend="triton")
    with pytest.raises(ConfigError, match="q and k have 3 heads and v has 2"):
        gated_delta_rule(**tensors)


class Watched:
    """Triton's interpreter, which also notes accesses that lie in none of the tensors that the kernel was given."""

    def __init__(self, genuine: Any) -> None:
        self.genuine = genuine
        self.ranges: list[tuple[int, int]] = []
        self.num_seen = 0
        self.outside: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.genuine, name)

    def take(self, tensors: tuple[Any, ...], short: int) -> None:
        """Know the memory of a launch's tensors, each `short` elements less."""
        self.ranges = []
        for t in tensors:
            if isinstance(t, torch.Tensor):
                last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
                self.ranges.append((t.data_ptr(), t.data_ptr() + (last + 1 - short) * t.element_size()))

    def look(self, pointers: Any, mask: Any, dtype: Any) -> None:
        """Note an access of a block, which is of one tensor."""
        touched = np.asarray(pointers).ravel()[np.asarray(mask).ravel().astype(bool)]
        if touched.size:
            first, end = int(touched.min()), int(touched.max()) + np.dtype(dtype).itemsize
            self.num_seen += 1
            if not any(low <= first and end <= high for low, high in self.ranges):
                self.outside.append((first, end))

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        """As the interpreter's."""
        self.look(pointers, mask, dtype)
        return self.genuine.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        """As the interpreter's."""
        self.look(pointers, mask, value.dtype)
        return self.genuine.store(pointers, value, mask)


@pytest.mark.parametrize("num_steps", [16, 37])
def test_no_access_leaves_its_tensor(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only one that meets unmapped memory would show."""
    watched, genuine = Watched(interpreter._interpreter), kernels.launch
    short = 0

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        watched.take(args, short)
        genuine(kernel, grid, *args, **options)

    monkeypatch.setattr(interpreter, "_interpreter", watched)
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(stages, "launch", launch)
    tensors = {name: value.float().requires_grad_() for name, value in inputs(num_steps).items()}

    def run() -> None:
        y, final = gated_delta_rule(
            **tensors, qk_l2norm=True, seq_idx=op_checks.documents(num_steps, 7)[:1], backend="triton"
        )
        (y.sum() + final.sum()).backward()

    run()
    assert watched.num_seen > 100 and watched.outside == []
    short = 1
    run()
    assert watched.outside
