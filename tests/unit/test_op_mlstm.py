"""xLSTM's matrix memory against its recurrence in fp64, and against transformers' function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import OP_FP32, OP_FP64, OP_OVER_PEER, relative_rms
from transformers.models.xlstm import modeling_xlstm as peer

from ssmtune.ops.mlstm import mlstm, mlstm_recurrence

BATCH, HEADS, WIDTH, VALUES = 2, 3, 4, 5
NAMES = ("q_BHTK", "k_BHTK", "v_BHTV", "igate_BHT", "fgate_BHT", "C", "n")


def inputs(num_steps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs in fp64; the forget gates keep a state for a few steps to a few hundred.

    Keys are positive, and so are queries, but for one head, where they are negative: where q n cancels, dividing by it
    multiplies whatever was rounded before.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64)

    shapes = ((num_steps, WIDTH), (num_steps, WIDTH), (num_steps, VALUES), (num_steps,), (num_steps,))
    tensors = dict(zip(NAMES, (normal(*shape) for shape in (*shapes, (WIDTH, VALUES), (WIDTH,))), strict=True))
    tensors |= {name: tensors[name].abs() for name in ("q_BHTK", "k_BHTK", "n")}
    tensors["q_BHTK"][:, 0] *= -1
    return tensors | {"fgate_BHT": 2 * tensors["fgate_BHT"] + 3, "igate_BHT": tensors["igate_BHT"] - 1}


def run(function: Any, tensors: dict[str, torch.Tensor], *, initial: bool, **options: Any) -> list[torch.Tensor]:
    """Output, final state in units of 1, and every gradient."""
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    memory, normaliser = leaves.pop("C"), leaves.pop("n")
    unit = torch.full_like(normaliser[..., :1], 0.5).detach()
    state = (memory, normaliser, unit) if initial else None
    y, (C, n, m) = function(**leaves, initial_state=state, **options)
    C, n = C * torch.exp(m)[..., None], n * torch.exp(m)
    (y.double().pow(2).sum() + C.double().pow(2).sum() + n.double().sum()).backward()
    gradients = [leaf.grad for leaf in (*leaves.values(), *((memory, normaliser) if initial else ()))]
    return [value.detach() for value in (y, C, n, *gradients) if value is not None]


def both(num_steps: int) -> list[dict[str, torch.Tensor]]:
    """Documents of several lengths, ending inside and at the end of a chunk; padding on either side and inside."""
    seq_idx = torch.stack([torch.arange(num_steps) // 5, torch.arange(num_steps) // 64])
    padding = torch.ones(BATCH, num_steps, dtype=torch.long)
    padding[0, : num_steps // 3] = 0
    padding[1, num_steps // 2 : num_steps // 2 + 2] = 0
    return [{}, {"seq_idx": seq_idx}, {"padding_mask": padding}]


@pytest.mark.parametrize("initial", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize("num_steps", [1, 2, 63, 64, 65, 131])
def test_chunks_are_the_recurrence_with_every_gradient(num_steps: int, initial: bool) -> None:
    offset = torch.randn(HEADS, WIDTH, VALUES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = inputs(num_steps) | {"offset_HKV": offset}
    for options in both(num_steps):
        found = run(mlstm, tensors, initial=initial, **options)
        truth = run(mlstm_recurrence, tensors, initial=initial, **options)
        assert len(found) == len(truth) == (11 if initial else 9)
        assert max(map(relative_rms, found, truth)) <= OP_FP64
        in_fp32 = run(mlstm, {name: value.float() for name, value in tensors.items()}, initial=initial, **options)
        assert max(map(relative_rms, in_fp32, truth)) <= OP_FP32


def test_a_padded_row_is_the_row_alone() -> None:
    tensors = inputs(9)
    mask = torch.ones(BATCH, 9, dtype=torch.long)
    mask[:, :4] = 0
    padded = run(mlstm, tensors, initial=False, padding_mask=mask)
    alone = {name: value[:, :, 4:] if name not in "Cn" else value for name, value in tensors.items()}
    expected = run(mlstm, alone, initial=False)
    assert relative_rms(padded[0][:, :, 4:], expected[0]) <= OP_FP64
    assert relative_rms(padded[1], expected[1]) <= OP_FP64


def test_equals_the_function_of_transformers() -> None:
    tensors = {name: value.float() for name, value in inputs(41).items()}
    truth, _ = mlstm_recurrence(**{name: value.double() for name, value in tensors.items() if name not in "Cn"})
    given = [tensors[name] for name in NAMES[:5]]
    expected, (_, _, m) = peer.mlstm_recurrent_sequence_native(*given, return_last_states=True)
    found, state = mlstm(*given)
    assert relative_rms(found, truth) <= relative_rms(expected, truth) + OP_OVER_PEER
    assert relative_rms(state[2], m) <= OP_FP32
