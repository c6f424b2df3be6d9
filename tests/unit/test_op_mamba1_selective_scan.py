"""Mamba-1's scan against its recurrence in fp64, and against transformers' function."""

from __future__ import annotations

import math
from typing import Any

import op_checks
import pytest
import torch
from op_checks import Tensors, documents
from tolerances import OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers.models.mamba import modeling_mamba as peer

from ssmtune.ops.mamba1_selective_scan import mamba1_recurrence, mamba1_selective_scan, mamba1_state_update
from ssmtune.ops.mamba1_selective_scan.reference import CHUNK_SIZE

CHANNELS, STATE = 5, 3
LENGTHS = (1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 5)

SCAN = op_checks.Operation(
    function=mamba1_selective_scan,
    recurrence=mamba1_recurrence,
    state="initial_state_BDN",
    options={"dt_softplus": True},
    time_first=False,
    kept_wide=("A_DN", "D_D", "dt_bias_D"),
)


def inputs(num_steps: int, *, initial: bool = True, seed: int = 0) -> Tensors:
    """Inputs of the sizes that a trained model has: decays from almost none to almost all of the state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "x_BDT": normal(2, CHANNELS, num_steps),
        "dt_BDT": normal(2, CHANNELS, num_steps),
        "A_DN": -torch.exp(torch.linspace(-3, 3, CHANNELS * STATE, dtype=torch.float64)).view(CHANNELS, STATE),
        "B_BNT": normal(2, STATE, num_steps),
        "C_BNT": normal(2, STATE, num_steps),
        "D_D": normal(CHANNELS),
        "z_BDT": normal(2, CHANNELS, num_steps),
        "dt_bias_D": normal(CHANNELS) - 2.0,
    }
    return tensors | ({"initial_state_BDN": normal(2, CHANNELS, STATE)} if initial else {})


def test_recurrence_equals_loops_over_scalars() -> None:
    """The vectorised recurrence is the truth of all tests below; here it meets the paper's formula by element."""
    t = inputs(3)
    y, final = mamba1_recurrence(**t, dt_softplus=True)
    for b in range(2):
        for d in range(CHANNELS):
            state = t["initial_state_BDN"][b, d].tolist()
            for step in range(3):
                dt = math.log1p(math.exp(float(t["dt_BDT"][b, d, step] + t["dt_bias_D"][d])))
                x, z = float(t["x_BDT"][b, d, step]), float(t["z_BDT"][b, d, step])
                for n in range(STATE):
                    decay = math.exp(dt * float(t["A_DN"][d, n]))
                    state[n] = decay * state[n] + dt * x * float(t["B_BNT"][b, n, step])
                read = sum(state[n] * float(t["C_BNT"][b, n, step]) for n in range(STATE)) + float(t["D_D"][d]) * x
                assert float(y[b, d, step]) == pytest.approx(read * z / (1 + math.exp(-z)), rel=1e-10)
            assert final[b, d].tolist() == pytest.approx(state, rel=1e-10)


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scan_is_the_recurrence(num_steps: int, initial: bool) -> None:
    op_checks.check_recurrence(SCAN, inputs(num_steps, initial=initial))


@pytest.mark.parametrize("lost", ["D_D", "z_BDT", "dt_bias_D"])
def test_options_may_be_absent(lost: str) -> None:
    tensors = inputs(9)
    del tensors[lost]
    op_checks.check_recurrence(SCAN, tensors)


def test_step_sizes_may_come_ready() -> None:
    tensors = inputs(70) | {"dt_BDT": inputs(70)["dt_BDT"].abs() + 3.0}
    op_checks.check_recurrence(SCAN, tensors, dt_softplus=False)


@pytest.mark.parametrize("starts", [(40,), (5, 64), (1, 2, 64, 65, 100)], ids=["two", "three", "six"])
def test_documents_are_kept_apart(starts: tuple[int, ...]) -> None:
    op_checks.check_documents(SCAN, inputs(131), documents(131, *starts))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [5, 131])
def test_padding_leaves_the_state_alone(num_steps: int, side: str) -> None:
    op_checks.check_padding(SCAN, inputs(num_steps), num_steps, side)


@pytest.mark.parametrize("cut", [1, CHUNK_SIZE - 1, CHUNK_SIZE, 100])
def test_two_calls_are_one(cut: int) -> None:
    op_checks.check_two_calls(SCAN, inputs(131), cut)


def test_bf16_inputs_keep_fp32_arithmetic() -> None:
    op_checks.check_bf16(SCAN, inputs(131))


def test_autocast_changes_nothing() -> None:
    op_checks.check_autocast(SCAN, inputs(70))


def test_extreme_decay_stays_finite() -> None:
    """dt up to 1e3 times A down to -1e4: the decay is zero in fp32, its gradients too, and nothing overflows."""
    tensors = inputs(131)
    tensors["A_DN"] = torch.full((CHANNELS, STATE), -1e4, dtype=torch.float64)
    tensors["dt_BDT"][..., ::7] = 1e3
    op_checks.check_recurrence(SCAN, tensors)


@pytest.mark.parametrize("lost", ["seq_idx", "padding_mask", "initial_state_BDN", "z_BDT", "D_D", "dt_bias_D"])
def test_a_scan_that_ignores_an_argument_is_found(lost: str) -> None:
    options: dict[str, Any] = {"seq_idx": documents(70, 30), "padding_mask": op_checks.padding(70, "left")[0]}
    fault = op_checks.without(mamba1_selective_scan, lost)
    op_checks.check_a_fault_is_seen(SCAN, fault, inputs(70), **options)


def test_a_backward_that_stops_at_a_chunk_is_found() -> None:
    """Right forward, wrong gradient: the state between two chunks is cut off from what came before."""

    def cut(**arguments: Any) -> Any:
        y, between = mamba1_selective_scan(**op_checks.at_steps(arguments, slice(0, 64)), dt_softplus=True)
        rest = op_checks.at_steps(arguments, slice(64, None)) | {"initial_state_BDN": between.detach()}
        y_rest, final = mamba1_selective_scan(**rest, dt_softplus=True)
        return torch.cat([y, y_rest], dim=-1), final

    wrong = op_checks.Operation(function=cut, recurrence=mamba1_recurrence, state="", options={})
    truth = op_checks.run_with_gradients(mamba1_recurrence, inputs(70), torch.float64, dt_softplus=True)
    found = op_checks.errors(op_checks.run_with_gradients(wrong.function, inputs(70), torch.float64), truth)
    assert found["y"] <= OP_FP64 and found["state"] <= OP_FP64
    assert found["gradient of A_DN"] > 1e-3 and found["gradient of initial_state_BDN"] > 1e-3


def test_all_states_never_exist_at_once() -> None:
    """The backward keeps inputs and one state a chunk: less than the [B, D, T, N] tensor of all states."""
    num_steps = 20 * CHUNK_SIZE
    tensors = {name: value.float() for name, value in inputs(num_steps).items()}
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        assert tensor.dim() < 4 or tensor.shape[0] == 20
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mamba1_selective_scan(**leaves, dt_softplus=True)
    per_step = 4 * 2 * (CHANNELS + STATE)  # bytes of one [B, D] and one [B, N] row
    assert 0 < sum(kept.values()) < 8 * num_steps * per_step


def test_single_steps_are_the_scan() -> None:
    tensors = inputs(9)
    y, final = mamba1_selective_scan(**tensors, dt_softplus=True)
    state = tensors["initial_state_BDN"].clone()
    for t in range(9):
        now = {name: value[..., t] for name, value in tensors.items() if name.endswith("T")}
        y_t = mamba1_state_update(
            state, now["x_BDT"], now["dt_BDT"], tensors["A_DN"], now["B_BNT"], now["C_BNT"],
            D_D=tensors["D_D"], z_BD=now["z_BDT"], dt_bias_D=tensors["dt_bias_D"], dt_softplus=True,
        )  # fmt: skip
        assert relative_rms(y_t, y[..., t]) <= OP_FP64
    assert relative_rms(state, final) <= OP_FP64


def test_a_single_step_keeps_the_precision_of_its_state() -> None:
    tensors = inputs(1)
    state = torch.zeros(2, CHANNELS, STATE)
    now = [tensors[name][..., 0].bfloat16() for name in ("x_BDT", "dt_BDT", "B_BNT", "C_BNT")]
    with torch.autocast("cpu", torch.bfloat16):
        y = mamba1_state_update(state, now[0], now[1], tensors["A_DN"].float(), now[2], now[3])
    assert y.dtype == torch.bfloat16 and not torch.equal(state, state.bfloat16().float())


def peer_scan(**tensors: torch.Tensor) -> Any:
    """transformers' function under the names of ours; it starts from zero."""
    order = [tensors[name] for name in ("x_BDT", "dt_BDT", "A_DN", "B_BNT", "C_BNT", "D_D", "z_BDT", "dt_bias_D")]
    return peer.mamba_selective_scan(*order, delta_softplus=True, return_last_state=True)


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scan_is_no_worse_than_transformers(num_steps: int) -> None:
    tensors = inputs(num_steps, initial=False, seed=3)
    truth = op_checks.run_with_gradients(mamba1_recurrence, tensors, torch.float64, dt_softplus=True)
    ours = op_checks.run_with_gradients(mamba1_selective_scan, tensors, torch.float32, dt_softplus=True)
    theirs = op_checks.run_with_gradients(peer_scan, tensors, torch.float32)
    for name, value in truth.items():
        assert relative_rms(ours[name], value) <= relative_rms(theirs[name], value) + OP_OVER_PEER, name
        assert relative_rms(ours[name], theirs[name]) <= 2 * OP_FP32, name


def test_single_step_is_no_worse_than_transformers() -> None:
    t = inputs(1)
    truth, truth_state = mamba1_recurrence(**t, dt_softplus=True)
    now = {name: (value[..., 0] if name.endswith("T") else value).float() for name, value in t.items()}
    order = [now[name] for name in ("x_BDT", "dt_BDT", "A_DN", "B_BNT", "C_BNT")]
    ours_state, theirs_state = now["initial_state_BDN"].clone(), now["initial_state_BDN"].clone()
    options = {"dt_softplus": True}
    ours = mamba1_state_update(
        ours_state, *order, D_D=now["D_D"], z_BD=now["z_BDT"], dt_bias_D=now["dt_bias_D"], **options
    )
    theirs = peer.mamba_selective_state_update(
        theirs_state, *order, now["D_D"], z=now["z_BDT"], dt_bias=now["dt_bias_D"], **options
    )
    assert relative_rms(ours, truth[..., 0]) <= relative_rms(theirs, truth[..., 0]) + OP_OVER_PEER
    assert relative_rms(ours_state, truth_state) <= relative_rms(theirs_state, truth_state) + OP_OVER_PEER
