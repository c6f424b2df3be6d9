"""The RG-LRU against its recurrence in fp64, and against transformers' module."""

from __future__ import annotations

import math
from typing import Any

import op_checks
import pytest
import torch
import torch.nn.functional as F
from op_checks import Tensors, documents
from tolerances import OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from ssmtune.ops.rg_lru import rg_lru, rg_lru_recurrence

CHANNELS = 6
LENGTHS = (1, 2, 8, 9, 10, 63, 131)
"""A chunk is about sqrt(T) steps long: full and partly filled ones."""

UNIT = op_checks.Operation(
    function=rg_lru,
    recurrence=rg_lru_recurrence,
    state="initial_state_BD",
    options={},
    kept_wide=("log_a_BTD",),
)


def inputs(num_steps: int, *, initial: bool = True, seed: int = 0) -> Tensors:
    """Inputs in fp64, with gates from 0.9999 down to 0.01."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x_BTD": normal(2, num_steps, CHANNELS),
        "log_a_BTD": -torch.exp(
            torch.linspace(-8, 1, CHANNELS, dtype=torch.float64) + normal(2, num_steps, CHANNELS) / 3
        ),
    }
    return tensors | ({"initial_state_BD": normal(2, CHANNELS)} if initial else {})


def test_recurrence_equals_loops_over_scalars() -> None:
    t = inputs(3, initial=False)
    y, final = rg_lru_recurrence(**t)
    for b in range(2):
        for d in range(CHANNELS):
            state = 0.0
            for step in range(3):
                a = math.exp(float(t["log_a_BTD"][b, step, d]))
                gain = math.sqrt(1 - a * a) if step else 1.0
                state = a * state + gain * float(t["x_BTD"][b, step, d])
                assert float(y[b, step, d]) == pytest.approx(state, rel=1e-10)
            assert float(final[b, d]) == pytest.approx(state, rel=1e-10)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_unit_is_the_recurrence(num_steps: int, initial: bool) -> None:
    op_checks.check_recurrence(UNIT, inputs(num_steps, initial=initial))


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("starts", [(40,), (5, 64), (1, 2, 64, 65, 100)], ids=["two", "three", "six"])
def test_documents_are_kept_apart(starts: tuple[int, ...], initial: bool) -> None:
    op_checks.check_documents(UNIT, inputs(131, initial=initial), documents(131, *starts))


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [5, 131])
def test_padding_leaves_the_state_alone(num_steps: int, side: str, initial: bool) -> None:
    op_checks.check_padding(UNIT, inputs(num_steps, initial=initial), num_steps, side)


def test_padding_inside_packed_documents() -> None:
    """A document that begins with padding starts at its first real step."""
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[:, 10:14] = 0
    for initial in (False, True):
        op_checks.check_recurrence(UNIT, inputs(30, initial=initial), padding_mask=mask, seq_idx=documents(30, 11, 20))


def test_a_learned_initial_state_before_a_start() -> None:
    """With `starts_BT` a document may start from a state that is not zero."""
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 0] = True
    op_checks.check_recurrence(UNIT, inputs(20), starts_BT=starts)
    tensors = inputs(20, initial=False)
    zero = {"initial_state_BD": torch.zeros(2, CHANNELS, dtype=torch.float64)}
    assert torch.equal(rg_lru(**tensors)[0], rg_lru(**tensors, **zero, starts_BT=starts)[0])
    assert not torch.equal(rg_lru(**tensors)[0], rg_lru(**tensors, **zero)[0])


@pytest.mark.parametrize("cut", [1, 11, 12, 100])
def test_two_calls_are_one(cut: int) -> None:
    op_checks.check_two_calls(UNIT, inputs(131, initial=cut != 11), cut)


def test_bf16_inputs_keep_fp32_arithmetic() -> None:
    op_checks.check_bf16(UNIT, inputs(131))


def test_autocast_changes_nothing() -> None:
    op_checks.check_autocast(UNIT, inputs(70))


def test_extreme_gates_stay_finite() -> None:
    """A gate that closes wholly, and one that is 1 in fp32, where the slope of the square root is infinite."""
    tensors = inputs(131)
    tensors["log_a_BTD"][:, ::5] = -1e4
    op_checks.check_recurrence(UNIT, tensors)
    tensors["log_a_BTD"][:, 1::5] = 0.0
    found = op_checks.run_with_gradients(rg_lru, tensors, torch.float32)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


@pytest.mark.parametrize("lost", ["seq_idx", "padding_mask", "initial_state_BD"])
def test_a_unit_that_ignores_an_argument_is_found(lost: str) -> None:
    options: dict[str, Any] = {"seq_idx": documents(70, 30), "padding_mask": op_checks.padding(70, "left")[0]}
    op_checks.check_a_fault_is_seen(UNIT, op_checks.without(rg_lru, lost), inputs(70), **options)


def test_a_first_step_scaled_like_the_others_is_found() -> None:
    def scaled(**arguments: Any) -> Any:
        return rg_lru(**arguments, starts_BT=torch.zeros(arguments["x_BTD"].shape[:2], dtype=torch.bool))

    op_checks.check_a_fault_is_seen(UNIT, scaled, inputs(20, initial=False))


def test_unit_is_no_worse_than_transformers() -> None:
    """transformers computes gates and recurrence in one module; ours gets the gates of the same parameters."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(hidden_size=8, lru_width=8, num_attention_heads=2)
    module = RecurrentGemmaRglru(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    position_ids = torch.cat([torch.arange(40), torch.arange(23)])[None].expand(2, -1)
    x = torch.randn(2, 63, 8)

    def ours(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        heads = x.to(dtype).view(2, 63, 2, 4)
        gates = []
        for name in ("input_gate", "recurrent_gate"):
            weight, bias = (getattr(module, f"{name}_{part}").to(dtype) for part in ("weight", "bias"))
            gates.append(torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, weight) + bias).reshape(2, 63, 8))
        log_a = -8.0 * gates[1] * F.softplus(module.recurrent_param.to(dtype))
        function = rg_lru_recurrence if dtype == torch.float64 else rg_lru
        out: torch.Tensor = function(x.to(dtype) * gates[0], log_a, seq_idx=documents(63, 40)[:1].expand(2, -1))[0]
        return out

    results = []
    for run in (
        lambda x: ours(x, torch.float64),
        lambda x: ours(x, torch.float32),
        lambda x: module(x, position_ids),
    ):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        inputs_of = [leaf, *module.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y.double().square().sum(), inputs_of)])
    for truth, mine, theirs in zip(*results, strict=True):
        assert relative_rms(mine, truth) <= relative_rms(theirs, truth) + OP_OVER_PEER
        assert relative_rms(mine, theirs) <= 2 * OP_FP32


def test_single_steps_are_the_unit() -> None:
    tensors = inputs(9, initial=False)
    y, final = rg_lru(**tensors)
    state: torch.Tensor | None = None
    for t in range(9):
        y_t, state = rg_lru(tensors["x_BTD"][:, t : t + 1], tensors["log_a_BTD"][:, t : t + 1], initial_state_BD=state)
        assert relative_rms(y_t[:, 0], y[:, t]) <= OP_FP64
    assert state is not None and relative_rms(state, final) <= OP_FP64
