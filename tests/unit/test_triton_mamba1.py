"""The kernels of Mamba-1's scan in Triton's interpreter, against the step-by-step recurrence in fp64: outputs and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import op_checks
import pytest
import torch
from op_checks import Tensors, documents
from tolerances import BF16_ROUND_ONCE, relative_rms

pytest.importorskip("triton", reason="the kernels need Triton, which is built for Linux only")

from ssmtune.errors import ConfigError
from ssmtune.ops.mamba1_selective_scan import mamba1_recurrence, mamba1_selective_scan, stages
from ssmtune.ops.mamba1_selective_scan import triton as kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")

SCAN = op_checks.Operation(
    function=partial(mamba1_selective_scan, backend="triton"),
    recurrence=mamba1_recurrence,
    state="initial_state_BDN",
    options={"dt_softplus": True},
    time_first=False,
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Several chunks in a short sequence, several blocks of channels in a program."""
    for name, value in {"CHUNK": 8, "CHUNK_BACK": 8, "KEPT": 2, "MAX_SHARES": 1}.items():
        monkeypatch.setattr(kernels, name, value)


def inputs(batch: int, channels: int, size: int, num_steps: int, *left_out: str) -> Tensors:
    """Decays from almost none to almost all of the state."""
    g = torch.Generator().manual_seed(num_steps)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {
        "x_BDT": normal(batch, channels, num_steps),
        "dt_BDT": normal(batch, channels, num_steps),
        "A_DN": -torch.exp(torch.linspace(-3, 3, channels * size, dtype=torch.float64)).view(channels, size),
        "B_BNT": normal(batch, size, num_steps),
        "C_BNT": normal(batch, size, num_steps),
        "D_D": normal(channels),
        "z_BDT": normal(batch, channels, num_steps),
        "dt_bias_D": normal(channels) - 2.0,
        "initial_state_BDN": normal(batch, channels, size),
    }
    return {name: value for name, value in tensors.items() if name not in left_out}


def test_one_step_without_any_option() -> None:
    tensors = inputs(1, 3, 3, 1, "D_D", "z_BDT", "dt_bias_D", "initial_state_BDN")
    op_checks.check_kernels(SCAN, tensors | {"dt_BDT": tensors["dt_BDT"].abs()}, dt_softplus=False)


def test_a_state_goes_through_chunks() -> None:
    op_checks.check_kernels(SCAN, inputs(2, 5, 3, 9))


def test_documents_and_padding() -> None:
    """A document of one step, one from a chunk's edge, one from inside; several blocks of channels in a program."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 1]])
    op_checks.check_kernels(SCAN, inputs(1, 40, 16, 10), seq_idx=documents(10, 3, 4, 8)[:1], padding_mask=mask)


def test_layouts_of_a_model() -> None:
    """Views of wider tensors as a layer passes them, with gradients in the shape of what was given."""
    t = {name: value.float() for name, value in inputs(1, 5, 3, 5).items()}
    wide = torch.randn(1, 5, 20)
    wide[..., 2:5], wide[..., 5:8] = t["B_BNT"].transpose(1, 2), t["C_BNT"].transpose(1, 2)
    wide[..., 10:15] = t["x_BDT"].transpose(1, 2)
    views = t | {
        "B_BNT": wide[..., 2:5].transpose(1, 2),
        "C_BNT": wide[..., 5:8].transpose(1, 2),
        "x_BDT": wide[..., 10:15].transpose(1, 2),
        "A_DN": t["A_DN"].t().contiguous().t(),
        "initial_state_BDN": t["initial_state_BDN"][:1].expand(1, -1, -1),
    }
    y, final = SCAN.function(**views, dt_softplus=True)
    expected_y, expected_final = SCAN.function(**t, dt_softplus=True)
    assert torch.equal(y, expected_y) and torch.equal(final, expected_final)
    assert y.transpose(1, 2).is_contiguous()


def test_bf16_is_rounded_once() -> None:
    tensors = inputs(1, 4, 3, 6)
    wide = ("A_DN", "D_D", "dt_bias_D", "initial_state_BDN")
    held = {name: value.to(torch.float32 if name in wide else torch.bfloat16) for name, value in tensors.items()}

    def mixed(**leaves: Any) -> Any:
        return SCAN.function(**{name: leaf.to(held[name].dtype) for name, leaf in leaves.items()}, dt_softplus=True)

    exact = {name: value.double() for name, value in held.items()}
    truth = op_checks.run_with_gradients(mamba1_recurrence, exact, torch.float64, dt_softplus=True)
    found = op_checks.run_with_gradients(mixed, exact, torch.float64)
    # What arrives at y is rounded to bf16 as well, which costs its own half unit.
    assert max(relative_rms(found[name], truth[name]) for name in truth) <= 2 * BF16_ROUND_ONCE


def reset_late(flags: Any) -> Any:
    return flags & 1 | (flags & 2).roll(1, dims=-1)


@pytest.mark.parametrize("fault", ["reset late", "no decay between chunks", "gradient of the initial state dropped"])
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of the tests above is far below what each costs."""
    tensors, options = inputs(1, 3, 3, 9), {"seq_idx": documents(9, 3)[:1]}
    scan = SCAN.function
    if fault == "reset late":
        genuine_flags = kernels._flags
        monkeypatch.setattr(kernels, "_flags", lambda *given: reset_late(genuine_flags(*given)))
    elif fault == "no decay between chunks":
        genuine_pass = stages.pass_kernel

        class WithoutDecay:
            def __getitem__(self, grid: Any) -> Any:
                return lambda states, sums, *rest, **more: genuine_pass[grid](states, sums.zero_(), *rest, **more)

        monkeypatch.setattr(stages, "pass_kernel", WithoutDecay())
        options = {}
    else:

        def scan(initial_state_BDN: Any, **arguments: Any) -> Any:
            return SCAN.function(initial_state_BDN=initial_state_BDN.detach(), **arguments)

    with pytest.raises(AssertionError):
        op_checks.check_kernels(
            op_checks.Operation(function=scan, recurrence=mamba1_recurrence, state=SCAN.state, options=SCAN.options),
            tensors, limit=1e-3, **options,
        )  # fmt: skip


def test_kernels_say_what_they_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="float64"):
        SCAN.function(**inputs(1, 3, 3, 2))
    with pytest.raises(ConfigError, match="state size 65 is over 64"):
        SCAN.function(**{name: value.float() for name, value in inputs(1, 3, 65, 2).items()})
