"""An additional scan becomes a plain model with more states, where such a model computes the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from contracts.tiny import (
    CASES,
    Case,
    assert_same_logits,
    cache_of,
    cached,
    logits_of,
    randomise,
    tiny_config,
    tiny_model,
    tiny_tokens,
)
from tolerances import FP32_EPS, LOGITS_FP32, LOGITS_MERGED, largest_difference

from ssmtune.attach import attach
from ssmtune.errors import AttachError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.widen import widen

WIDENED = [
    case
    for case in CASES
    # Several groups or odd sizes, and what else the two kinds of layers come in.
    if get_family(case[0]).state_size is not None and (case[1] == "odd" or case[0] in ("mamba", "mamba2"))
]
ROUND_TRIP = 4 * FP32_EPS
"""A logarithm of an exponential: each is off by a unit of the last place or two."""
SCAN = Edit(method="additional_scan", select=("state.additional_scan",), options={"num_states": 3})


def scanned(case: Case, *edits: Edit) -> torch.nn.Module:
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), Recipe(name="scan", edits=(*edits, SCAN)))).eval()
    # Moved far enough that every further state matters: at its start an additional scan reads nothing out.
    randomise(adapted, scale=0.3 if not edits else 0.05)
    return adapted


@pytest.mark.parametrize("case", WIDENED, ids="-".join)
def test_widened_equals_adapted(case: Case, tmp_path: Path) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = scanned(case)
    expected = logits_of(adapted, tokens)
    with adapted.disable_adapter():
        assert largest_difference(logits_of(adapted, tokens), expected) > 10 * LOGITS_MERGED
    wide = widen(adapted)
    assert type(wide) is type(tiny_model(case))
    assert wide.generation_config.to_dict() == tiny_model(case).generation_config.to_dict()
    name = get_family(case[0]).state_size
    assert getattr(wide.config, name) == getattr(tiny_config(case), name) + 3
    assert_same_logits(logits_of(wide, tokens), expected, wide, tokens, LOGITS_MERGED)
    wide.save_pretrained(tmp_path)
    again = type(wide).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again, tokens), logits_of(wide, tokens))


def test_other_edits_are_merged_into_the_wider_model() -> None:
    case = ("granite_hybrid", "odd")
    tokens = tiny_tokens(case, 2, 17)
    adapted = scanned(case, Edit(method="lora", select=("recurrent",)), Edit(method="core", select=("core",)))
    expected = logits_of(adapted, tokens)
    wide = widen(adapted)
    assert_same_logits(logits_of(wide, tokens), expected, wide, tokens, LOGITS_MERGED)


@pytest.mark.parametrize("decay", ["copy_last", "copy_first"])
def test_copied_decays_start_at_those_of_the_base(decay: str) -> None:
    case = ("mamba", "tied")
    edit = Edit(method="additional_scan", select=SCAN.select, options={"num_states": 2, "decay": decay})
    wide = widen(attach(tiny_model(case), make_plan(tiny_model(case), Recipe(name="scan", edits=(edit,)))))
    A_log = wide.backbone.layers[0].mixer.A_log.detach()
    copied = A_log[:, 7:8] if decay == "copy_last" else A_log[:, :1]
    assert largest_difference(A_log[:, 8:], copied.expand(-1, 2)) <= ROUND_TRIP


def test_decays_go_on_from_those_of_s4d_real() -> None:
    wide = widen(attach(tiny_model(("mamba", "tied")), make_plan(tiny_model(("mamba", "tied")), "additional-scan")))
    expected = torch.log(torch.arange(9.0, 17.0))
    found = wide.backbone.layers[0].mixer.A_log.detach()[:, 8:]
    assert largest_difference(found, expected.expand(64, -1)) <= ROUND_TRIP


@pytest.mark.parametrize("case", [("jamba", "dense"), ("falcon_h1", "norm")], ids="-".join)
def test_models_that_normalise_or_scale_B_and_C_are_refused(case: Case) -> None:
    case = next(c for c in CASES if c[0] == case[0])
    adapted = scanned(case)
    with pytest.raises(AttachError, match="cannot widen.*normalises or scales"):
        widen(adapted)
    logits_of(adapted, tiny_tokens(case, 1, 5))  # still whole


def test_what_no_size_holds_and_uneven_layers_are_refused() -> None:
    case = ("mamba", "tied")
    with pytest.raises(AttachError, match="cannot widen: method initial_state"):
        widen(scanned(case, Edit(method="initial_state", select=("state.initial_state",))))
    one = Edit(method="additional_scan", select=SCAN.select, layers=(0,))
    plan = make_plan(tiny_model(case), Recipe(name="scan", edits=(one,)))
    with pytest.raises(AttachError, match="1 of 2 recurrent layers"):
        widen(attach(tiny_model(case), plan))


def test_a_gated_delta_rule_is_refused_with_the_reason() -> None:
    case = next(c for c in CASES if c[0] == "qwen3_next")
    with pytest.raises(PlacementError, match=re.escape("additional scan needs Mamba-1 or Mamba-2 layers")):
        make_plan(tiny_model(case), "additional-scan")


@pytest.mark.parametrize("case", [("mamba", "biases"), ("granite_hybrid", "odd")], ids="-".join)
def test_beams_take_their_further_states_along(case: Case) -> None:
    """A cache whose rows change places hands each row on with the inputs of the additional scan's convolution."""
    adapted, tokens = scanned(case), tiny_tokens(case, 2, 6)
    with torch.no_grad():
        cache = cache_of(case, adapted(input_ids=tokens[:, :5], use_cache=True))
        cache.reorder_cache(torch.tensor([1, 0]))
        step = adapted(input_ids=tokens.flip(0)[:, 5:], **cached(case, cache)).logits
    assert largest_difference(step[:, 0], logits_of(adapted, tokens.flip(0))[:, -1]) <= LOGITS_FP32
