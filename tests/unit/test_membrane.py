"""The membranes of a gate: their recurrence against one step at a time, their gradients, padding, and what trains."""

from __future__ import annotations

import pytest
import torch
from contracts.tiny import (
    Case,
    assert_same_logits,
    cache_of,
    cached,
    logits_of,
    randomise,
    tiny_model,
    tiny_tokens,
)
from tolerances import OP_FP64, largest_difference, relative_rms
from transformers import MambaConfig

from ssmtune.attach import attach
from ssmtune.errors import PlacementError
from ssmtune.inventory import take_inventory
from ssmtune.models import weightless
from ssmtune.ops.membrane import SLOT, leaky_membrane
from ssmtune.placement import named_recipe
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

LEAK, THRESHOLD, CHUNK = 0.9, 0.6, 3


def inputs(num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    drive_BTR = torch.randn(2, num_steps, 4, generator=generator, dtype=torch.float64)
    return drive_BTR, 0.3 * torch.randn(2, CHUNK, 4, generator=generator, dtype=torch.float64)


def charged_by_steps(drive_BTR: torch.Tensor, entering_BSR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values before the reset [B, T, R], and after it with those that enter before them [B, S + T, R]."""
    before, after = [], list(entering_BSR.unbind(1))
    for drive in drive_BTR.unbind(1):
        before.append(LEAK * after[-CHUNK] + drive)
        after.append(before[-1] * (before[-1] <= THRESHOLD))
    return torch.stack(before, dim=1), torch.stack(after, dim=1)


def test_chunks_equal_one_step_at_a_time() -> None:
    drive, entering = inputs(11)
    before, after = charged_by_steps(drive, entering)
    assert 0.1 < (before > THRESHOLD).double().mean() < 0.6, "the reset is not tried"
    u, leaving = leaky_membrane(drive, entering, leak=LEAK, threshold=THRESHOLD)
    assert relative_rms(u, after[:, CHUNK:]) < OP_FP64
    assert relative_rms(leaving, after[:, -CHUNK:]) < OP_FP64


def test_gradients_are_those_of_the_pieces() -> None:
    """Against finite differences, with values that reset among them and none within a step of the jump."""
    drive, entering = inputs(8)
    before, _ = charged_by_steps(drive, entering)
    assert bool((before > THRESHOLD).any()) and float((before - THRESHOLD).abs().min()) > 1e-4

    def run(drive: torch.Tensor, entering: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return leaky_membrane(drive, entering, leak=LEAK, threshold=THRESHOLD)

    assert torch.autograd.gradcheck(run, (drive.requires_grad_(), entering.requires_grad_()))


def test_padding_is_no_token() -> None:
    """On either side and between: tokens get the same bits, and so does what leaves; padded steps get zero."""
    drive, entering = inputs(7)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0]])
    u, leaving = leaky_membrane(drive, entering, leak=LEAK, threshold=THRESHOLD, padding_mask_BT=mask)
    assert not bool(u[mask == 0].any())
    for row in range(2):
        tokens = mask[row].bool()
        alone, left = leaky_membrane(
            drive[row : row + 1, tokens], entering[row : row + 1], leak=LEAK, threshold=THRESHOLD
        )
        assert torch.equal(u[row, tokens], alone[0]) and torch.equal(leaving[row], left[0])


def test_a_later_token_changes_nothing_before_it() -> None:
    case = ("mamba", "tied")
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), "memba")).eval()
    randomise(adapted, scale=0.3)
    tokens = tiny_tokens(case, 1, 20)
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    found, expected = logits_of(adapted, changed), logits_of(adapted, tokens)
    assert torch.equal(found[:, :12], expected[:, :12])
    assert largest_difference(found[:, 12:], expected[:, 12:]) > 1e-2


@pytest.mark.parametrize("case", [("mamba", "biases"), ("granite_hybrid", "odd"), ("falcon_h1", "norm-first")])
def test_the_cache_permutes_and_forgets_membranes(case: Case) -> None:
    """As beam search does, and as a cache that is used again."""
    recipe = Recipe(name="short", edits=(Edit(method="memba", select=("state.membrane",), options={"chunk": 2}),))
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), recipe)).eval()
    randomise(adapted, scale=0.3)
    tokens = tiny_tokens(case, 2, 9)
    swapped = torch.tensor([1, 0])
    with torch.no_grad():
        cache = cache_of(case, adapted(input_ids=tokens[:, :5], use_cache=True))
        slots = [layer.recurrent_states[SLOT] for layer in cache.layers if hasattr(layer, "recurrent_states")]
        assert slots and all(bool(slot.any()) and slot.dtype == torch.float32 for slot in slots)
        cache.reorder_cache(swapped)
        found = adapted(input_ids=tokens[swapped, 5:], use_cache=True, **cached(case, cache)).logits
    assert_same_logits(found[swapped], logits_of(adapted, tokens)[:, 5:], adapted, tokens)
    cache.reset()
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    assert not any(bool(layer.recurrent_states[SLOT].any()) for layer in layers)


@pytest.mark.parametrize("case", [("qwen3_next", "odd"), ("falcon_h1", "no-norm")])
def test_gates_out_of_reach_are_refused_by_name(case: Case) -> None:
    with pytest.raises(PlacementError, match="Memba needs Mamba-1 or Mamba-2 layers"):
        make_plan(tiny_model(case), "memba")


def test_as_many_train_as_in_the_publication() -> None:
    """Its share for Mamba-130M, of base and adapter together, is that of rank 32 throughout."""
    model = weightless(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280, state_size=16))
    plan = make_plan(model, named_recipe("memba", rank=32))
    assert plan.trainable == 24 * 32 * (2 * 1536 + (768 + 3072) + (1536 + 768))
    assert round(100 * plan.trainable / (take_inventory(model).total + plan.trainable), 2) == 5.20
