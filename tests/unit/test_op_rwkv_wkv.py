"""RWKV-4's WKV against its recurrence in fp64, and against transformers' function."""

from __future__ import annotations

import math
from typing import Any

import op_checks
import pytest
import torch
from op_checks import Tensors, documents
from tolerances import OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers.models.rwkv import modeling_rwkv as peer

from ssmtune.ops.rwkv_wkv import rwkv_wkv, rwkv_wkv_recurrence

CHANNELS = 6
LENGTHS = (1, 2, 8, 9, 10, 63, 131)
"""A chunk of the scan is about sqrt(T) steps long: full and partly filled ones."""


def in_one_unit(function: Any) -> Any:
    """The state as num and den in units of 1: `top` only says in which unit they are given."""

    def run(**arguments: Any) -> Any:
        if arguments.get("initial_state_3BD") is not None:
            num, den = arguments["initial_state_3BD"]
            arguments["initial_state_3BD"] = torch.stack([num / 8, den / 8, torch.full_like(num, math.log(8))])
        y, state = function(**arguments)
        return y, state[:2] * torch.exp(state[2])

    return run


WKV = op_checks.Operation(
    function=in_one_unit(rwkv_wkv),
    recurrence=in_one_unit(rwkv_wkv_recurrence),
    state="initial_state_3BD",
    options={},
    state_batch=1,
    kept_wide=("time_decay_D", "time_first_D"),
)


def inputs(num_steps: int, *, initial: bool = True, seed: int = 0) -> Tensors:
    """Inputs in fp64, with half-lives from half a step to hundreds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "time_decay_D": torch.linspace(-6, 1, CHANNELS, dtype=torch.float64),
        "time_first_D": normal(CHANNELS),
        "k_BTD": normal(2, num_steps, CHANNELS),
        "v_BTD": normal(2, num_steps, CHANNELS),
    }
    state = torch.stack([normal(2, CHANNELS), normal(2, CHANNELS).abs() + 1])
    return tensors | ({"initial_state_3BD": state} if initial else {})


def test_recurrence_equals_loops_over_scalars() -> None:
    """From the definition, as a weighted average of the values so far."""
    t = inputs(4, initial=False)
    y, _ = rwkv_wkv_recurrence(**t)
    for b in range(2):
        for d in range(CHANNELS):
            w, u = -math.exp(float(t["time_decay_D"][d])), float(t["time_first_D"][d])
            k, v = t["k_BTD"][b, :, d].tolist(), t["v_BTD"][b, :, d].tolist()
            for step in range(4):
                weights = [math.exp(w * (step - 1 - i) + k[i]) for i in range(step)] + [math.exp(u + k[step])]
                average = sum(a * b for a, b in zip(weights, v, strict=False)) / sum(weights)
                assert float(y[b, step, d]) == pytest.approx(average, rel=1e-10)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_wkv_is_the_recurrence(num_steps: int, initial: bool) -> None:
    op_checks.check_recurrence(WKV, inputs(num_steps, initial=initial))


@pytest.mark.parametrize("starts", [(40,), (5, 64), (1, 2, 64, 65, 100)], ids=["two", "three", "six"])
def test_documents_are_kept_apart(starts: tuple[int, ...]) -> None:
    op_checks.check_documents(WKV, inputs(131), documents(131, *starts))


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [5, 131])
def test_padding_leaves_the_state_alone(num_steps: int, side: str, initial: bool) -> None:
    op_checks.check_padding(WKV, inputs(num_steps, initial=initial), num_steps, side)


@pytest.mark.parametrize("cut", [1, 11, 12, 100])
def test_two_calls_are_one(cut: int) -> None:
    op_checks.check_two_calls(WKV, inputs(131), cut)


def test_bf16_inputs_keep_fp32_arithmetic() -> None:
    op_checks.check_bf16(WKV, inputs(131))


def test_autocast_changes_nothing() -> None:
    op_checks.check_autocast(WKV, inputs(70))


def test_large_keys_and_decays_stay_finite() -> None:
    """exp(300) overflows fp32 and exp(-e^6) is zero: only differences of exponents may be taken."""
    tensors = inputs(131, initial=False)
    tensors["k_BTD"] = 300 * tensors["k_BTD"].sign() + tensors["k_BTD"]
    tensors["time_decay_D"][-1] = 6.0
    truth = op_checks.run_with_gradients(rwkv_wkv_recurrence, tensors, torch.float64)
    found = op_checks.run_with_gradients(rwkv_wkv, tensors, torch.float32)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert relative_rms(found["y"], truth["y"]) <= 300 * OP_FP32  # a key of 300 is rounded to 2^-16


@pytest.mark.parametrize("lost", ["seq_idx", "padding_mask", "initial_state_3BD"])
def test_a_wkv_that_ignores_an_argument_is_found(lost: str) -> None:
    options: dict[str, Any] = {"seq_idx": documents(70, 30), "padding_mask": op_checks.padding(70, "left")[0]}
    op_checks.check_a_fault_is_seen(WKV, op_checks.without(WKV.function, lost), inputs(70), **options)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_wkv_is_no_worse_than_transformers(num_steps: int, initial: bool) -> None:
    tensors = inputs(num_steps, initial=initial, seed=3)

    @in_one_unit
    def peer_wkv(**t: torch.Tensor) -> Any:
        state = list(t["initial_state_3BD"]) if initial else None
        key, value = t["k_BTD"], t["v_BTD"]
        y, state = peer.rwkv_linear_attention_cpu(t["time_decay_D"], t["time_first_D"], key, value, state, True)
        return y, torch.stack(state)

    truth = op_checks.run_with_gradients(WKV.recurrence, tensors, torch.float64)
    ours = op_checks.run_with_gradients(WKV.function, tensors, torch.float32)
    theirs = op_checks.run_with_gradients(peer_wkv, tensors, torch.float32)
    for name, value in truth.items():
        assert relative_rms(ours[name], value) <= relative_rms(theirs[name], value) + OP_OVER_PEER, name
        assert relative_rms(ours[name], theirs[name]) <= 2 * OP_FP32, name


def test_single_steps_are_the_wkv() -> None:
    tensors = inputs(9, initial=False)
    y, final = rwkv_wkv(**tensors)
    state: torch.Tensor | None = None
    for t in range(9):
        now = op_checks.at_steps(tensors, slice(t, t + 1))
        y_t, state = rwkv_wkv(**now, initial_state_3BD=state)
        assert relative_rms(y_t[:, 0], y[:, t]) <= OP_FP64
    assert state is not None and relative_rms(state[:2], final[:2]) <= OP_FP64
