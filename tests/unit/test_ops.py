"""The recurrent operations against the step-by-step recurrence in fp64: outputs, states and every gradient.

The three-way rule: with truth in fp64, our fp32 error may not exceed that of transformers' own fp32 function by more
than a stated tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BF16_ROUND_ONCE, OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as peer

from ssmtune.errors import ConfigError
from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan, mamba2_recurrence
from ssmtune.ops.selective_state_update import selective_state_update

LENGTHS = (1, 5, 63, 64, 65, 131)
BATCH, HEADS, WIDTH, STATE = 2, 4, 3, 5
CHANNELS, TAPS = 6, 4

Tensors = dict[str, torch.Tensor]


def scan(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`mamba2_chunk_scan` with its inputs in the order in which the models give them."""
    inputs = [arguments.pop(name) for name in ("x_BTHP", "dt_BTH", "A_H", "B_BTGN", "C_BTGN")]
    return mamba2_chunk_scan(*inputs, **arguments)


def conv(**arguments: Any) -> torch.Tensor:
    return causal_conv1d(arguments.pop("x_BCT"), arguments.pop("weight_CK"), **arguments)


def test_operations_take_their_tensors_by_name() -> None:
    """Names of public functions are part of their contract: a call by keyword must work."""
    y, _ = mamba2_chunk_scan(**scan_inputs(3))
    assert torch.equal(y, scan(**scan_inputs(3))[0])
    assert torch.equal(causal_conv1d(**conv_inputs(3)), conv(**conv_inputs(3)))


def scan_inputs(num_steps: int, *, num_groups: int = 1, initial: bool = False, seed: int = 0) -> Tensors:
    """Inputs in fp64, of the sizes that a trained model has: decays from almost none to almost all of the state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x_BTHP": normal(BATCH, num_steps, HEADS, WIDTH),
        "dt_BTH": normal(BATCH, num_steps, HEADS),
        "A_H": -torch.exp(torch.linspace(-3, 2, HEADS, dtype=torch.float64)),
        "B_BTGN": normal(BATCH, num_steps, num_groups, STATE),
        "C_BTGN": normal(BATCH, num_steps, num_groups, STATE),
        "D_H": normal(HEADS),
        "dt_bias_H": normal(HEADS) - 2.0,
    }
    if initial:
        tensors["initial_states_BHPN"] = normal(BATCH, HEADS, WIDTH, STATE)
    return tensors


def run_with_gradients(
    function: Callable[..., Any], tensors: Tensors, dtype: torch.dtype, **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs, final state and the gradient of every input under one fixed random loss over both."""
    leaves = {name: value.detach().clone().to(dtype).requires_grad_() for name, value in tensors.items()}
    y, state = function(**leaves, **options)
    generator = torch.Generator().manual_seed(99)
    loss = (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    loss = loss + (state.double() * torch.randn(state.shape, generator=generator, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y.detach(), "state": state.detach()} | {
        f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def assert_close(found: Tensors, truth: Tensors, tolerance: float) -> None:
    assert found.keys() == truth.keys()
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    assert max(errors.values()) <= tolerance, errors


def documents(num_steps: int) -> torch.Tensor:
    """Document numbers [B, T]: another split in each row, single steps and a split at a chunk's edge included."""
    first = torch.zeros(num_steps, dtype=torch.int32)
    for start in (1, 2, 7, 64, 100):
        first[start:] += 1
    second = (torch.arange(num_steps) >= 3).to(torch.int32)
    return torch.stack([first, second])


def test_recurrence_equals_loops_over_scalars() -> None:
    """The vectorised recurrence is the truth of all tests below; here it meets the paper's formula by element."""
    t = scan_inputs(4, num_groups=2, initial=True)
    y, final = mamba2_recurrence(**t, dt_softplus=True, dt_limit=(0.05, 1.5))
    for b in range(BATCH):
        for h in range(HEADS):
            group = h // (HEADS // 2)
            for p in range(WIDTH):
                state = [float(v) for v in t["initial_states_BHPN"][b, h, p]]
                for step in range(4):
                    raw = float(t["dt_BTH"][b, step, h] + t["dt_bias_H"][h])
                    dt = min(max(math.log1p(math.exp(raw)), 0.05), 1.5)
                    x = float(t["x_BTHP"][b, step, h, p])
                    for n in range(STATE):
                        fed = dt * x * float(t["B_BTGN"][b, step, group, n])
                        state[n] = math.exp(dt * float(t["A_H"][h])) * state[n] + fed
                    read = sum(state[n] * float(t["C_BTGN"][b, step, group, n]) for n in range(STATE))
                    assert float(y[b, step, h, p]) == pytest.approx(read + float(t["D_H"][h]) * x, rel=1e-10)
                assert final[b, h, p].tolist() == pytest.approx(state, rel=1e-10)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scan_is_the_recurrence(num_steps: int, num_groups: int, initial: bool) -> None:
    tensors = scan_inputs(num_steps, num_groups=num_groups, initial=initial)
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, dt_softplus=True)
    assert_close(run_with_gradients(scan, tensors, torch.float64, dt_softplus=True), truth, OP_FP64)
    assert_close(run_with_gradients(scan, tensors, torch.float32, dt_softplus=True), truth, OP_FP32)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scan_resets_at_documents(num_steps: int, initial: bool) -> None:
    tensors = scan_inputs(num_steps, num_groups=2, initial=initial)
    options = {"dt_softplus": True, "seq_idx": documents(num_steps)}
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, **options)
    assert_close(run_with_gradients(scan, tensors, torch.float64, **options), truth, OP_FP64)
    assert_close(run_with_gradients(scan, tensors, torch.float32, **options), truth, OP_FP32)


@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.1, 0.8), (0.0, 0.3)])
@pytest.mark.parametrize("softplus", [False, True])
def test_scan_limits_the_step_size(dt_limit: tuple[float, float], softplus: bool) -> None:
    tensors = scan_inputs(65)
    if not softplus:
        tensors["dt_BTH"] = tensors["dt_BTH"].abs() + 2.0  # a negative step would make the decay explode
    options = {"dt_softplus": softplus, "dt_limit": dt_limit}
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, **options)
    assert_close(run_with_gradients(scan, tensors, torch.float64, **options), truth, OP_FP64)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [5, 64, 131])
def test_scan_ignores_padding(num_steps: int, side: str) -> None:
    """With padding on either side the state and the real outputs are those of the sequence alone."""
    num_padded, num_real = num_steps // 3, num_steps - num_steps // 3
    tensors = scan_inputs(num_steps, initial=True)
    mask = torch.ones(BATCH, num_steps)
    real = slice(num_padded, None) if side == "left" else slice(0, num_real)
    mask[:, slice(0, num_padded) if side == "left" else slice(num_real, None)] = 0
    alone = {name: value[:, real] if "BT" in name else value for name, value in tensors.items()}
    y_alone, state_alone = scan(**alone, dt_softplus=True)
    y, state = scan(**tensors, dt_softplus=True, padding_mask=mask)
    assert relative_rms(y[:, real], y_alone) <= OP_FP64
    assert relative_rms(state, state_alone) <= OP_FP64
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, dt_softplus=True, padding_mask=mask)
    found = run_with_gradients(scan, tensors, torch.float64, dt_softplus=True, padding_mask=mask)
    assert_close(found, truth, OP_FP64)


def test_scan_in_two_calls_is_one_call() -> None:
    tensors = scan_inputs(131, num_groups=2, initial=True)
    y, state = scan(**tensors, dt_softplus=True)
    for cut in (1, 63, 64, 100):
        first = {name: value[:, :cut] if "BT" in name else value for name, value in tensors.items()}
        rest = {name: value[:, cut:] if "BT" in name else value for name, value in tensors.items()}
        y_first, between = scan(**first, dt_softplus=True)
        y_rest, final = scan(**(rest | {"initial_states_BHPN": between}), dt_softplus=True)
        assert relative_rms(torch.cat([y_first, y_rest], dim=1), y) <= OP_FP64
        assert relative_rms(final, state) <= OP_FP64


def test_scan_does_not_overflow_over_many_steps() -> None:
    """Strong decay for thousands of steps: ratios of decays must be taken as differences of logs."""
    tensors = scan_inputs(4096)
    tensors["A_H"] = torch.full((HEADS,), -16.0, dtype=torch.float64)
    y, state = scan(**{k: v.float() for k, v in tensors.items()}, dt_softplus=True)
    assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(state).all())
    truth, _ = mamba2_recurrence(**tensors, dt_softplus=True)
    assert relative_rms(y, truth) <= OP_FP32


def test_scan_keeps_fp32_arithmetic_for_bf16_inputs() -> None:
    """The output is rounded to bf16 once; the state is not rounded at all."""
    tensors = {name: value.bfloat16() for name, value in scan_inputs(131, num_groups=2).items()}
    # The decay stays what it is in a model: fp32, computed from A_log.
    tensors["A_H"] = tensors["A_H"].float()
    y, state = scan(**tensors, dt_softplus=True)
    y_wide, state_wide = scan(**{k: v.float() for k, v in tensors.items()}, dt_softplus=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(state, state_wide)
    assert torch.equal(y, y_wide.bfloat16())
    truth, _ = mamba2_recurrence(**{k: v.double() for k, v in tensors.items()}, dt_softplus=True)
    assert relative_rms(y, truth) <= BF16_ROUND_ONCE


def test_autocast_changes_no_operation() -> None:
    tensors = {name: value.float() for name, value in scan_inputs(65, initial=True).items()}
    weight, x = torch.randn(CHANNELS, TAPS), torch.randn(BATCH, CHANNELS, 9)
    step = {name: value[:, 0] if "BT" in name else value for name, value in tensors.items()}

    def run() -> list[torch.Tensor]:
        state, window = step["initial_states_BHPN"].clone(), torch.ones(BATCH, CHANNELS, TAPS)
        y_step = selective_state_update(
            state, step["x_BTHP"], step["dt_BTH"], step["A_H"], step["B_BTGN"], step["C_BTGN"],
            D_H=step["D_H"], dt_bias_H=step["dt_bias_H"], dt_softplus=True,
        )  # fmt: skip
        scanned = scan(**tensors, dt_softplus=True)
        return [*scanned, y_step, state, causal_conv1d(x, weight), causal_conv1d_update(x[..., :1], window, weight)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("num_groups", [1, 2])
def test_single_steps_are_the_scan(num_groups: int) -> None:
    tensors = scan_inputs(9, num_groups=num_groups, initial=True)
    y, final = scan(**tensors, dt_softplus=True, dt_limit=(0.05, 0.9))
    state = tensors["initial_states_BHPN"].clone()
    for t in range(9):
        y_t = selective_state_update(
            state,
            *(tensors[name][:, t] for name in ("x_BTHP", "dt_BTH")),
            tensors["A_H"],
            *(tensors[name][:, t] for name in ("B_BTGN", "C_BTGN")),
            D_H=tensors["D_H"],
            dt_bias_H=tensors["dt_bias_H"],
            dt_softplus=True,
            dt_limit=(0.05, 0.9),
        )
        assert relative_rms(y_t, y[:, t]) <= OP_FP64
    assert relative_rms(state, final) <= OP_FP64


def test_single_step_keeps_the_precision_of_the_state_it_is_given() -> None:
    tensors = scan_inputs(1)
    state = torch.zeros(BATCH, HEADS, WIDTH, STATE, dtype=torch.float32)
    x, dt, B, C = (tensors[n][:, 0].bfloat16() for n in ("x_BTHP", "dt_BTH", "B_BTGN", "C_BTGN"))
    y = selective_state_update(state, x, dt, tensors["A_H"].float(), B, C)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert not torch.equal(state, state.bfloat16().float())


def peer_scan(**tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' function under the names of ours."""
    result: tuple[torch.Tensor, torch.Tensor] = peer.mamba2_chunk_scan(
        tensors["x_BTHP"],
        tensors["dt_BTH"],
        tensors["A_H"],
        tensors["B_BTGN"],
        tensors["C_BTGN"],
        chunk_size=64,
        D=tensors["D_H"],
        dt_bias=tensors["dt_bias_H"],
        initial_states=tensors.get("initial_states_BHPN"),
        dt_softplus=True,
        return_final_states=True,
    )
    return result


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scan_is_no_worse_than_transformers(num_steps: int, num_groups: int, initial: bool) -> None:
    tensors = scan_inputs(num_steps, num_groups=num_groups, initial=initial, seed=3)
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, dt_softplus=True)
    ours = run_with_gradients(scan, tensors, torch.float32, dt_softplus=True)
    theirs = run_with_gradients(peer_scan, tensors, torch.float32)
    for name, value in truth.items():
        assert relative_rms(ours[name], value) <= relative_rms(theirs[name], value) + OP_OVER_PEER, name
        assert relative_rms(ours[name], theirs[name]) <= 2 * OP_FP32, name


def test_scan_keeps_the_digits_of_a_mild_decay_after_strong_ones() -> None:
    """As a fresh Granite layer decays: e^-1.3 to e^-20 a step. A decay is the difference of two running logs."""
    tensors = scan_inputs(131, seed=3) | {"A_H": -torch.tensor([1.0, 4.0, 8.0, 16.0], dtype=torch.float64)}
    tensors["dt_BTH"] = 0.2 * tensors["dt_BTH"]
    tensors["dt_bias_H"] = torch.ones(HEADS, dtype=torch.float64)
    truth = run_with_gradients(mamba2_recurrence, tensors, torch.float64, dt_softplus=True)
    found = run_with_gradients(scan, tensors, torch.float32, dt_softplus=True)
    for name, value in truth.items():
        assert relative_rms(found[name], value) <= OP_OVER_PEER, name


def test_single_step_is_no_worse_than_transformers() -> None:
    t = scan_inputs(1, num_groups=2, initial=True)
    now = {name: value[:, 0] if "BT" in name else value for name, value in t.items()}
    truth, truth_state = mamba2_recurrence(**t, dt_softplus=True)
    f = {name: value.float() for name, value in now.items()}
    ours_state, theirs_state = f["initial_states_BHPN"].clone(), f["initial_states_BHPN"].clone()
    ours = selective_state_update(
        ours_state, f["x_BTHP"], f["dt_BTH"], f["A_H"], f["B_BTGN"], f["C_BTGN"],
        D_H=f["D_H"], dt_bias_H=f["dt_bias_H"], dt_softplus=True,
    )  # fmt: skip
    theirs = peer.mamba2_selective_state_update(
        theirs_state,
        f["x_BTHP"],
        f["dt_BTH"][..., None].expand(-1, -1, WIDTH),
        f["A_H"][:, None, None].expand(-1, WIDTH, STATE),
        f["B_BTGN"],
        f["C_BTGN"],
        f["D_H"][:, None].expand(-1, WIDTH),
        dt_bias=f["dt_bias_H"][:, None].expand(-1, WIDTH),
        dt_softplus=True,
    )
    assert relative_rms(ours, truth[:, 0]) <= relative_rms(theirs, truth[:, 0]) + OP_OVER_PEER
    assert relative_rms(ours_state, truth_state) <= relative_rms(theirs_state, truth_state) + OP_OVER_PEER


def conv_inputs(num_steps: int, *, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x_BCT": (BATCH, CHANNELS, num_steps), "weight_CK": (CHANNELS, TAPS), "bias_C": (CHANNELS,)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def conv_by_hand(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """One output after another, from the definition."""
    if padding_mask is not None:
        x_BCT = x_BCT * padding_mask[:, None].to(x_BCT.dtype)
    columns = []
    for t in range(x_BCT.shape[-1]):
        total = torch.zeros_like(x_BCT[..., 0])
        for lag in range(min(TAPS, t + 1)):
            tap = x_BCT[..., t - lag] * weight_CK[:, TAPS - 1 - lag]
            if seq_idx is not None:
                tap = tap * (seq_idx[:, t] == seq_idx[:, t - lag])[:, None]
            total = total + tap
        columns.append(total if bias_C is None else total + bias_C)
    out = torch.stack(columns, dim=-1)
    return out * torch.sigmoid(out) if activation else out


def with_empty_state(function: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Let a function without a final state go through `run_with_gradients`."""
    return lambda **arguments: (function(**arguments), torch.zeros(1))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_conv_is_its_definition(num_steps: int, packed: bool, activation: str | None) -> None:
    options = {"activation": activation, "seq_idx": documents(num_steps) if packed else None}
    tensors = conv_inputs(num_steps)
    truth = run_with_gradients(with_empty_state(conv_by_hand), tensors, torch.float64, **options)
    assert_close(run_with_gradients(with_empty_state(conv), tensors, torch.float64, **options), truth, OP_FP64)
    assert_close(run_with_gradients(with_empty_state(conv), tensors, torch.float32, **options), truth, OP_FP32)


def test_conv_without_bias_when_packed() -> None:
    tensors = conv_inputs(9)
    del tensors["bias_C"]
    seq_idx = documents(9)
    assert relative_rms(conv(**tensors, seq_idx=seq_idx), conv_by_hand(**tensors, seq_idx=seq_idx)) <= OP_FP64


@pytest.mark.parametrize("side", ["left", "right"])
def test_conv_reads_padding_as_zero(side: str) -> None:
    tensors = conv_inputs(12)
    mask = torch.ones(BATCH, 12)
    mask[:, : 5 if side == "left" else None][:, slice(None) if side == "left" else slice(7, None)] = 0
    found = conv(**tensors, padding_mask=mask)
    assert relative_rms(found, conv_by_hand(**tensors, padding_mask=mask)) <= OP_FP64
    real = slice(5, None) if side == "left" else slice(0, 7)
    alone = causal_conv1d(tensors["x_BCT"][..., real], tensors["weight_CK"], tensors["bias_C"])
    assert relative_rms(found[..., real], alone) <= OP_FP64


def test_conv_mask_aligns_with_the_end() -> None:
    """Steps in front of the mask come from a cache and are real."""
    tensors = conv_inputs(10)
    short = torch.tensor([[0.0, 1, 1, 1], [1, 1, 1, 1]])
    whole = torch.cat([torch.ones(BATCH, 6), short], dim=1)
    found = conv(**tensors, padding_mask=short)
    assert torch.equal(found, conv(**tensors, padding_mask=whole))
    assert not torch.equal(found, conv(**tensors))


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_conv_equals_transformers(num_steps: int, activation: str | None) -> None:
    """Unpacked and unpadded both are one call of the same convolution: bitwise equal."""
    tensors = {name: value.float() for name, value in conv_inputs(num_steps).items()}
    theirs_activation = "silu" if activation else None
    theirs = peer.causal_conv1d_fn(tensors["x_BCT"], tensors["weight_CK"], tensors["bias_C"], theirs_activation)
    assert torch.equal(causal_conv1d(*tensors.values(), activation), theirs)


@pytest.mark.parametrize("state_length", [TAPS, TAPS - 1])
@pytest.mark.parametrize("num_new", [1, 3])
def test_conv_update_continues_the_sequence(state_length: int, num_new: int) -> None:
    tensors = conv_inputs(11)
    weight, bias, x = tensors["weight_CK"], tensors["bias_C"], tensors["x_BCT"]
    truth = conv_by_hand(x, weight, bias, "silu")
    seen = 11 - 2 * num_new
    state = x[..., seen - state_length : seen].clone()
    for start in (seen, seen + num_new):
        out = causal_conv1d_update(x[..., start : start + num_new], state, weight, bias, "silu")
        assert relative_rms(out, truth[..., start : start + num_new]) <= OP_FP64
    assert torch.equal(state, x[..., -state_length:])


@pytest.mark.parametrize("state_length", [TAPS, TAPS - 1])
def test_conv_update_equals_transformers(state_length: int) -> None:
    t = {name: value.float() for name, value in conv_inputs(1).items()}
    ours_state = torch.randn(BATCH, CHANNELS, state_length)
    theirs_state = ours_state.clone()
    ours = causal_conv1d_update(t["x_BCT"], ours_state, t["weight_CK"], t["bias_C"], "silu")
    theirs = peer.causal_conv1d_update(t["x_BCT"], theirs_state, t["weight_CK"], t["bias_C"], "silu")
    assert torch.equal(ours, theirs) and torch.equal(ours_state, theirs_state)


def test_conv_refuses_an_unknown_activation() -> None:
    tensors = conv_inputs(3)
    with pytest.raises(ConfigError, match="'gelu'.*allowed"):
        conv(**tensors, activation="gelu")


splits = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(lengths=splits, seed=st.integers(0, 1000), initial=st.booleans())
def test_any_packing_of_the_scan_equals_its_documents(lengths: list[int], seed: int, initial: bool) -> None:
    """Outputs of a packed row are those of each document alone; only the first one sees the initial state."""
    total = sum(lengths)
    tensors = scan_inputs(total, num_groups=2, initial=initial, seed=seed)
    state = tensors.pop("initial_states_BHPN", None)
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)]).expand(BATCH, -1)
    packed, final = scan(**tensors, initial_states_BHPN=state, dt_softplus=True, seq_idx=numbers)
    start = 0
    for index, length in enumerate(lengths):
        part = {n: v[:, start : start + length] if "BT" in n else v for n, v in tensors.items()}
        alone, last = scan(**part, initial_states_BHPN=state if index == 0 else None, dt_softplus=True)
        assert relative_rms(packed[:, start : start + length], alone) <= OP_FP64
        start += length
    assert relative_rms(final, last) <= OP_FP64


@settings(max_examples=40, deadline=None)
@given(lengths=splits, seed=st.integers(0, 1000))
def test_any_packing_of_the_conv_equals_its_documents(lengths: list[int], seed: int) -> None:
    tensors = conv_inputs(sum(lengths), seed=seed)
    numbers = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)]).expand(BATCH, -1)
    packed = conv(**tensors, activation="silu", seq_idx=numbers)
    parts = torch.split(tensors["x_BCT"], lengths, dim=-1)
    alone = [causal_conv1d(part, tensors["weight_CK"], tensors["bias_C"], "silu") for part in parts]
    assert relative_rms(packed, torch.cat(alone, dim=-1)) <= OP_FP64
