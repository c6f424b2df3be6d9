"""The convolution from an initial window of inputs, as the short convolutions of LFM2 and tuned states need it."""

from __future__ import annotations

from typing import Any

import op_checks
import pytest
import torch
import torch.nn.functional as F
from op_checks import Tensors, documents
from tolerances import OP_FP64, relative_rms
from transformers.models.lfm2 import modeling_lfm2 as peer

from ssmtune.errors import ConfigError
from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update

CHANNELS, TAPS = 5, 3
LENGTHS = (1, 2, 3, 4, 67)


def inputs(num_steps: int, *, taps: int = TAPS, bias: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(num_steps)
    shapes = {
        "x_BCT": (2, CHANNELS, num_steps),
        "weight_CK": (CHANNELS, taps),
        "initial_state_BCK": (2, CHANNELS, taps - 1),
    } | ({"bias_C": (CHANNELS,)} if bias else {})
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def conv(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The function with the state that the next call would start from, as the checks expect one."""
    y = causal_conv1d(**arguments)
    return y, window_after(**arguments)


def window_after(**arguments: Any) -> torch.Tensor:
    """The last K-1 real inputs of the last document, zeros where there are fewer."""
    x, mask, numbers = arguments["x_BCT"], arguments.get("padding_mask"), arguments.get("seq_idx")
    num_kept = arguments["weight_CK"].shape[1] - 1
    state = arguments.get("initial_state_BCK")
    rows = []
    for row in range(x.shape[0]):
        keep = torch.ones(x.shape[-1], dtype=torch.bool) if mask is None else mask[row].bool()
        before = x.new_zeros(x.shape[1], num_kept) if state is None else state[row]
        if numbers is not None and bool((numbers[row] != numbers[row, 0]).any()):
            keep, before = keep & (numbers[row] == numbers[row, -1]), torch.zeros_like(before)
        inside = torch.cat([before, x[row][:, keep]], dim=-1)
        rows.append(inside[:, inside.shape[-1] - num_kept :])
    return torch.stack(rows)


def conv_by_hand(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    initial_state_BCK: torch.Tensor | None = None,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A window slides over the real steps: shift the input in, multiply with the taps; a new document empties it."""
    given = {"x_BCT": x_BCT, "weight_CK": weight_CK, "initial_state_BCK": initial_state_BCK}
    empty = x_BCT.new_zeros(*x_BCT.shape[:2], weight_CK.shape[1] - 1)
    past = empty if initial_state_BCK is None else initial_state_BCK
    columns = []
    for t in range(x_BCT.shape[-1]):
        if seq_idx is not None and t > 0:
            past = past * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        window = torch.cat([past, x_BCT[..., t : t + 1]], dim=-1)
        out = (window * weight_CK).sum(-1) if bias_C is None else (window * weight_CK).sum(-1) + bias_C
        columns.append(F.silu(out) if activation else out)
        past = window[..., 1:]
    return torch.stack(columns, dim=-1), window_after(**given, seq_idx=seq_idx, padding_mask=padding_mask)


CONV = op_checks.Operation(
    function=conv, recurrence=conv_by_hand, state="initial_state_BCK", options={}, time_first=False
)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_conv_from_a_window_is_its_definition(num_steps: int, bias: bool, activation: str | None) -> None:
    op_checks.check_recurrence(CONV, inputs(num_steps, bias=bias), activation=activation)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_any_number_of_taps(taps: int) -> None:
    op_checks.check_recurrence(CONV, inputs(9, taps=taps))


@pytest.mark.parametrize("starts", [(40,), (1, 2, 5)], ids=["two", "four"])
def test_the_window_belongs_to_the_first_document(starts: tuple[int, ...]) -> None:
    op_checks.check_documents(CONV, inputs(67), documents(67, *starts))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [3, 4, 20])
def test_padding_does_not_come_between_window_and_inputs(num_steps: int, side: str) -> None:
    tensors = inputs(num_steps)
    mask, real = op_checks.padding(num_steps, side)
    y = causal_conv1d(**tensors, padding_mask=mask)[..., real]
    assert relative_rms(y, causal_conv1d(**op_checks.at_steps(tensors, real))) <= OP_FP64
    gradients = []
    for arguments, steps in (
        (tensors | {"padding_mask": mask}, real),
        (op_checks.at_steps(tensors, real), slice(None)),
    ):
        state = tensors["initial_state_BCK"].clone().requires_grad_()
        out = causal_conv1d(**(arguments | {"initial_state_BCK": state}))[..., steps]
        gradients += torch.autograd.grad(out.square().sum(), state)
    assert float(gradients[1].abs().min()) > 0 and relative_rms(*gradients) <= OP_FP64


def test_a_short_mask_leaves_the_window_before_the_first_step() -> None:
    """Steps in front of a mask are real, so that padding behind them does not push the window back."""
    tensors, short = inputs(9), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole = torch.cat([torch.ones_like(short[:, :3]), short], dim=1)
    found = causal_conv1d(**tensors, padding_mask=short)
    assert torch.equal(found, causal_conv1d(**tensors, padding_mask=whole))
    assert torch.equal(found[..., :2], causal_conv1d(**tensors)[..., :2])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_two_calls_are_one(cut: int) -> None:
    op_checks.check_two_calls(CONV, inputs(67), cut)


def test_bf16_inputs_keep_fp32_arithmetic() -> None:
    tensors = {name: value.bfloat16() for name, value in inputs(67).items()}
    wide = causal_conv1d(**{name: value.float() for name, value in tensors.items()})
    assert torch.equal(causal_conv1d(**tensors), wide.bfloat16())


def test_a_conv_that_ignores_the_window_is_found() -> None:
    op_checks.check_a_fault_is_seen(CONV, op_checks.without(conv, "initial_state_BCK"), inputs(9))


def test_a_window_of_another_length_is_refused() -> None:
    tensors = inputs(4)
    tensors["initial_state_BCK"] = torch.zeros(2, CHANNELS, TAPS)
    with pytest.raises(ConfigError, match="holds 3 inputs; a convolution of 3 taps needs 2"):
        causal_conv1d(**tensors)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_short_conv_equals_that_of_lfm2(bias: bool) -> None:
    """No activation; whole sequences and single steps, with a state of K or K-1 inputs."""
    t = {name: value.float() for name, value in inputs(9, bias=bias).items()}
    x, weight, bias_C = t["x_BCT"], t["weight_CK"], t.get("bias_C")
    assert torch.equal(causal_conv1d(x, weight, bias_C), peer.causal_conv1d_fn(x, weight, bias_C))
    for length in (TAPS, TAPS - 1):
        ours, theirs = x[..., :length].clone(), x[..., :length].clone()
        new = x[..., 5:6]
        assert torch.equal(
            causal_conv1d_update(new, ours, weight, bias_C), peer.causal_conv1d_update(new, theirs, weight, bias_C)
        )
        assert torch.equal(ours, theirs)
