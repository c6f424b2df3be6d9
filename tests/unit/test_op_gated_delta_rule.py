"""The gated delta rule, with a decay per head and per channel, against its recurrence and transformers' functions."""

from __future__ import annotations

import math
from typing import Any

import op_checks
import pytest
import torch
from op_checks import Tensors, documents
from tolerances import OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers.models.kimi_linear import modeling_kimi_linear as kda_peer
from transformers.models.qwen3_next import modeling_qwen3_next as gdn_peer

from ssmtune.errors import ConfigError
from ssmtune.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_recurrence, gated_delta_rule_update
from ssmtune.ops.gated_delta_rule.reference import CHUNK_SIZE

HEADS, KEY, VALUE = 4, 5, 3
LENGTHS = (1, 2, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 5)

RULE = op_checks.Operation(
    function=gated_delta_rule,
    recurrence=gated_delta_rule_recurrence,
    state="initial_state_BHKV",
    options={"qk_l2norm": True},
    kept_wide=("g",),
)

per_channel_or_head = pytest.mark.parametrize("per_channel", [False, True], ids=["per-head", "per-channel"])


def inputs(
    num_steps: int, per_channel: bool, *, initial: bool = True, num_heads: int = HEADS, seed: int = 0
) -> Tensors:
    """Inputs in fp64: decays from almost none to almost all of the state, beta between 0 and 2 (negative eigenvalues).

    `num_heads` is that of q and k.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay_shape = (2, num_steps, HEADS, KEY) if per_channel else (2, num_steps, HEADS)
    tensors = {
        "q_BTHK": normal(2, num_steps, num_heads, KEY),
        "k_BTHK": normal(2, num_steps, num_heads, KEY),
        "v_BTHV": normal(2, num_steps, HEADS, VALUE),
        "g": -torch.exp(1.5 * normal(*decay_shape) - 2),
        "beta_BTH": 2 * normal(2, num_steps, HEADS).sigmoid(),
    }
    return tensors | ({"initial_state_BHKV": normal(2, HEADS, KEY, VALUE)} if initial else {})


@per_channel_or_head
def test_recurrence_equals_loops_over_scalars(per_channel: bool) -> None:
    """The vectorised recurrence is the truth of all tests below; here it meets the papers' formula by element."""
    t = inputs(3, per_channel, num_heads=2)
    y, final = gated_delta_rule_recurrence(**t, qk_l2norm=True)
    for b in range(2):
        for h in range(HEADS):
            state = t["initial_state_BHKV"][b, h].tolist()
            for step in range(3):
                q, k = ([float(x) for x in t[name][b, step, h // 2]] for name in ("q_BTHK", "k_BTHK"))
                q, k = ([x / math.sqrt(sum(y * y for y in row) + 1e-6) for x in row] for row in (q, k))
                decays = t["g"][b, step, h].expand(KEY).tolist()
                state = [[math.exp(decays[i]) * value for value in state[i]] for i in range(KEY)]
                for j in range(VALUE):
                    predicted = sum(state[i][j] * k[i] for i in range(KEY))
                    change = float(t["beta_BTH"][b, step, h]) * (float(t["v_BTHV"][b, step, h, j]) - predicted)
                    for i in range(KEY):
                        state[i][j] += k[i] * change
                    read = sum(state[i][j] * q[i] for i in range(KEY)) / math.sqrt(KEY)
                    assert float(y[b, step, h, j]) == pytest.approx(read, rel=1e-10)
            assert sum(final[b, h].tolist(), []) == pytest.approx(sum(state, []), rel=1e-10)


@per_channel_or_head
@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_rule_is_the_recurrence(num_steps: int, initial: bool, per_channel: bool) -> None:
    op_checks.check_recurrence(RULE, inputs(num_steps, per_channel, initial=initial))


@per_channel_or_head
@pytest.mark.parametrize("num_heads", [1, 2])
def test_heads_of_q_and_k_serve_several_of_v(num_heads: int, per_channel: bool) -> None:
    op_checks.check_recurrence(RULE, inputs(70, per_channel, num_heads=num_heads))


@per_channel_or_head
def test_scale_and_normalisation_are_options(per_channel: bool) -> None:
    tensors = inputs(70, per_channel)
    tensors["k_BTHK"] /= 4  # as if normalised: longer keys let the state grow without bound
    op_checks.check_recurrence(RULE, tensors, qk_l2norm=False, scale=0.7)


@per_channel_or_head
@pytest.mark.parametrize("starts", [(40,), (5, 64), (1, 2, 64, 65, 100)], ids=["two", "three", "six"])
def test_documents_are_kept_apart(starts: tuple[int, ...], per_channel: bool) -> None:
    op_checks.check_documents(RULE, inputs(131, per_channel), documents(131, *starts))


@per_channel_or_head
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_steps", [5, 131])
def test_padding_leaves_the_state_alone(num_steps: int, side: str, per_channel: bool) -> None:
    op_checks.check_padding(RULE, inputs(num_steps, per_channel), num_steps, side)


@per_channel_or_head
@pytest.mark.parametrize("cut", [1, CHUNK_SIZE - 1, CHUNK_SIZE, 100])
def test_two_calls_are_one(cut: int, per_channel: bool) -> None:
    op_checks.check_two_calls(RULE, inputs(131, per_channel), cut)


@per_channel_or_head
def test_bf16_inputs_keep_fp32_arithmetic(per_channel: bool) -> None:
    op_checks.check_bf16(RULE, inputs(131, per_channel))


@per_channel_or_head
def test_autocast_changes_nothing(per_channel: bool) -> None:
    op_checks.check_autocast(RULE, inputs(70, per_channel))


@per_channel_or_head
def test_extreme_decay_stays_finite(per_channel: bool) -> None:
    """A log decay of -1e4 in some steps: zero in fp32, and its gradient too; nothing is divided by it."""
    tensors = inputs(131, per_channel)
    tensors["g"][:, ::7] = -1e4
    op_checks.check_recurrence(RULE, tensors)


@per_channel_or_head
@pytest.mark.parametrize("lost", ["seq_idx", "padding_mask", "initial_state_BHKV"])
def test_a_rule_that_ignores_an_argument_is_found(lost: str, per_channel: bool) -> None:
    options: dict[str, Any] = {"seq_idx": documents(70, 30), "padding_mask": op_checks.padding(70, "left")[0]}
    fault = op_checks.without(gated_delta_rule, lost)
    op_checks.check_a_fault_is_seen(RULE, fault, inputs(70, per_channel), **options)


@per_channel_or_head
@pytest.mark.parametrize("wrong", ["g", "beta_BTH"])
def test_a_wrong_gradient_under_a_right_forward_is_found(wrong: str, per_channel: bool) -> None:
    """What miscompiled kernels do: outputs are right, the gradient of a gate is halved."""

    def halved(**arguments: Any) -> Any:
        gate = arguments[wrong]
        return gated_delta_rule(**{**arguments, wrong: gate.detach() + 0.5 * (gate - gate.detach())})

    op_checks.check_a_fault_is_seen(RULE, halved, inputs(70, per_channel))


@per_channel_or_head
def test_single_steps_are_the_rule(per_channel: bool) -> None:
    tensors = inputs(9, per_channel, num_heads=2)
    y, final = gated_delta_rule(**tensors, qk_l2norm=True)
    state = tensors.pop("initial_state_BHKV").clone()
    for t in range(9):
        y_t = gated_delta_rule_update(state, *(value[:, t] for value in tensors.values()), qk_l2norm=True)
        assert relative_rms(y_t, y[:, t]) <= OP_FP64
    assert relative_rms(state, final) <= OP_FP64


def test_a_single_step_keeps_the_precision_of_its_state() -> None:
    tensors = inputs(1, False, initial=False)
    state = torch.zeros(2, HEADS, KEY, VALUE)
    now = [value[:, 0].bfloat16() for value in tensors.values()]
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_delta_rule_update(state, *now)
    assert y.dtype == torch.bfloat16 and not torch.equal(state, state.bfloat16().float())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="q and k have 3 heads and v has 4"):
        gated_delta_rule(**inputs(3, False, num_heads=3))


def peer_rule(**tensors: Any) -> Any:
    """transformers' function for the shape of the decay, under the names of ours."""
    names = ("q_BTHK", "k_BTHK", "v_BTHV")
    per_channel = tensors["g"].dim() == 4
    function = kda_peer.chunk_kimi_delta_attention if per_channel else gdn_peer.torch_chunk_gated_delta_rule
    return function(
        *(tensors[name] for name in names),
        g=tensors["g"],
        beta=tensors["beta_BTH"],
        initial_state=tensors.get("initial_state_BHKV"),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


@per_channel_or_head
@pytest.mark.parametrize("num_steps", LENGTHS)
def test_rule_is_no_worse_than_transformers(num_steps: int, per_channel: bool) -> None:
    tensors = inputs(num_steps, per_channel, num_heads=HEADS if per_channel else 2, seed=3)
    truth = op_checks.run_with_gradients(gated_delta_rule_recurrence, tensors, torch.float64, qk_l2norm=True)
    ours = op_checks.run_with_gradients(gated_delta_rule, tensors, torch.float32, qk_l2norm=True)
    theirs = op_checks.run_with_gradients(peer_rule, tensors, torch.float32)
    for name, value in truth.items():
        assert relative_rms(ours[name], value) <= relative_rms(theirs[name], value) + OP_OVER_PEER, name
        assert relative_rms(ours[name], theirs[name]) <= 2 * OP_FP32, name


@per_channel_or_head
def test_single_step_is_no_worse_than_transformers(per_channel: bool) -> None:
    t = inputs(1, per_channel)
    truth, truth_state = gated_delta_rule_recurrence(**t, qk_l2norm=True)
    f = {name: value.float() for name, value in t.items()}
    peer = kda_peer.recurrent_kimi_delta_attention if per_channel else gdn_peer.torch_recurrent_gated_delta_rule
    state = f.pop("initial_state_BHKV")
    theirs, theirs_state = peer(
        *list(f.values())[:3], g=f["g"], beta=f["beta_BTH"], initial_state=state, output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    ours = gated_delta_rule_update(state, *(value[:, 0] for value in f.values()), qk_l2norm=True)
    assert relative_rms(ours, truth[:, 0]) <= relative_rms(theirs, truth) + OP_OVER_PEER
    assert relative_rms(state, truth_state) <= relative_rms(theirs_state, truth_state) + OP_OVER_PEER
