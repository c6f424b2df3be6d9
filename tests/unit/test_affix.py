"""An affix is the same as its positions put into the row, and what it comes to can be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import (
    Case,
    assert_same_gradients,
    assert_same_logits,
    cache_of,
    cached,
    logits_of,
    randomise,
    tiny_inventory,
    tiny_model,
    tiny_tokens,
)
from safetensors.torch import load_file
from tolerances import LOGITS_FP32, largest_difference

from ssmtune.attach import attach
from ssmtune.compiled import compiled_starts, save_compiled
from ssmtune.errors import AttachError
from ssmtune.families.base import get_family
from ssmtune.operations import install_operations, recurrent_modules
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

EVERY_KIND: tuple[Case, ...] = (
    ("mamba", "biases"),
    ("jamba", "dense"),
    ("granite_hybrid", "odd"),
    ("qwen3_next", "odd"),
    ("olmo_hybrid", "odd"),
    ("kimi_linear", "odd"),
)
NUM_TOKENS = 5


def affixed(case: Case, *edits: Edit, **options: Any) -> Any:
    affix = Edit(method="affix", select=("state.affix",), options={"num_tokens": NUM_TOKENS, **options})
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), Recipe(name="affix", edits=(affix, *edits))))
    randomise(adapted, scale=0.5)
    return adapted.eval()


def inserted(case: Case, adapted: Any) -> Any:
    """The base on ssmtune's operations, with the positions of `adapted` in every row of every recurrent layer."""
    model, family = tiny_model(case), get_family(case[0])
    names = {module: name for name, module in model.named_modules()}
    for module in recurrent_modules(model, family):
        rows_MW = adapted.edits[f"{names[module]}.affix"]()
        taken = 0
        for projection, ranges in family.entry_rows(module).items():
            index = [row for first, end in ranges for row in range(first, end)]
            values = rows_MW[:, taken : taken + len(index)]
            taken += len(index)

            def put(layer: Any, args: Any, output: Any, index: Any = index, values: Any = values) -> Any:
                output = output.clone()
                output[:, :NUM_TOKENS] = 7.0  # what neither convolution nor recurrence reads may be anything
                output[:, :NUM_TOKENS, index] = values
                return output

            module.get_submodule(projection).register_forward_hook(put)
        assert taken == rows_MW.shape[1]
        module.register_forward_pre_hook(_lengthen, with_kwargs=True, prepend=True)
        module.register_forward_hook(lambda module, args, output: output[:, NUM_TOKENS:])
    install_operations(model, family)
    return model


def _lengthen(module: Any, args: Any, kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    hidden = torch.cat([hidden.new_ones(hidden.shape[0], NUM_TOKENS, hidden.shape[-1]), hidden], dim=1)
    return (hidden, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}


@pytest.mark.parametrize("case", EVERY_KIND, ids="-".join)
def test_equals_the_positions_put_into_the_row(case: Case) -> None:
    """Outputs, and gradients of the positions."""
    tokens = tiny_tokens(case, 2, 9)
    adapted = affixed(case)
    reference = inserted(case, adapted)
    found = adapted(input_ids=tokens, use_cache=False).logits
    expected = reference(input_ids=tokens, use_cache=False).logits
    assert_same_logits(found.detach(), expected.detach(), adapted, tokens)
    assert largest_difference(expected.detach(), logits_of(tiny_model(case), tokens)) > 100 * LOGITS_FP32
    assert_same_gradients(found, expected, list(adapted.trained_parameters().values()))


def test_a_projection_is_counted_and_acts() -> None:
    case = ("mamba", "tied")
    adapted = affixed(case, projection=6)
    width = next(c.shape[0] for c in tiny_inventory(case).states if c.role == "state.affix")
    assert width == 64
    assert adapted.plan.sites[0].num_params == NUM_TOKENS * 6 + 6 * 7 + 7 * width
    tokens = tiny_tokens(case, 1, 6)
    expected = logits_of(inserted(case, adapted), tokens)
    assert_same_logits(logits_of(adapted, tokens), expected, adapted, tokens)


def test_positions_start_from_a_trained_initial_state() -> None:
    """Both at once: first the state, then the positions, then the text."""
    case = ("granite_hybrid", "dense")
    adapted = affixed(case, Edit(method="initial_state", select=("state.initial_state",)))
    together = compiled_starts(adapted)
    for edit in adapted.edits.values():
        edit.enabled = "Positions" in type(edit).__name__
    alone = compiled_starts(adapted)
    assert together.keys() == alone.keys()
    assert any(largest_difference(together[name], alone[name]) > LOGITS_FP32 for name in alone)


@pytest.mark.parametrize("case", [("mamba", "biases"), ("granite_hybrid", "odd"), ("qwen3_next", "odd")], ids="-".join)
def test_compiled_start_in_a_cache_equals_the_affix(case: Case, tmp_path: Path) -> None:
    """A cache that holds the saved tensors before the first token makes the base continue as the adapted model begins."""
    tokens = tiny_tokens(case, 2, 6)
    adapted = affixed(case)
    expected = logits_of(adapted, tokens)
    save_compiled(adapted, tmp_path / "start.safetensors")
    starts = load_file(tmp_path / "start.safetensors")
    model, family = tiny_model(case), get_family(case[0])
    install_operations(model, family)
    with torch.no_grad():
        # Any token makes a cache of the right form; its attention layers are emptied again.
        cache = cache_of(case, model(input_ids=tokens[:, :1], use_cache=True))
        for layer in cache.layers:
            if not hasattr(layer, "conv_states"):
                layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        for module in recurrent_modules(model, family):
            layer = cache.layers[module.layer_idx]
            layer.recurrent_states[0].copy_(starts[f"{module.layer_idx}.state"].expand_as(layer.recurrent_states[0]))
            layer.conv_states[0].copy_(starts[f"{module.layer_idx}.window"].expand_as(layer.conv_states[0]))
        found = model(input_ids=tokens, use_cache=True, **cached(case, cache)).logits
    assert_same_logits(found, expected, adapted, tokens)


def test_nothing_to_compile_is_refused() -> None:
    adapted = attach(tiny_model(("mamba", "tied")), make_plan(tiny_model(("mamba", "tied")), "core"))
    with pytest.raises(AttachError, match="nothing to compile: core"):
        compiled_starts(adapted)


def test_padding_that_goes_on_past_the_first_chunk_is_refused() -> None:
    case = ("mamba", "tied")
    adapted = affixed(case)
    mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])
    tokens = tiny_tokens(case, 2, 4)
    with torch.no_grad():
        first = adapted(input_ids=tokens[:, :2], attention_mask=mask[:, :2], use_cache=True)
        with pytest.raises(AttachError, match="goes on past the first 2 steps"):
            adapted(input_ids=tokens[:, 2:], attention_mask=mask, **cached(case, cache_of(case, first)))
        first = adapted(input_ids=tokens[:, :3], attention_mask=mask[:, :3], use_cache=True)
        step = adapted(input_ids=tokens[:, 3:], attention_mask=mask, **cached(case, cache_of(case, first)))
    assert largest_difference(step.logits[:1], logits_of(adapted, tokens[:1, 3:])) <= LOGITS_FP32
