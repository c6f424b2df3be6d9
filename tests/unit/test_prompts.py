"""A prompt is the same as its embeddings put into the row, a prefix as its vectors put into every layer's input."""

from __future__ import annotations

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
    tiny_model,
    tiny_tokens,
)
from tolerances import LOGITS_FP32, largest_difference

from ssmtune.attach import attach
from ssmtune.errors import AttachError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.virtual_tokens import Insertion, backbone_of

NUM_TOKENS = 3
MODELS: tuple[Case, ...] = (
    ("mamba", "biases"),
    ("granite_hybrid", "dense"),
    ("qwen3_next", "odd"),
    ("lfm2", "dense"),
    ("llama", "dense"),
)


def edit_of(method: str, num_tokens: int = NUM_TOKENS, layers: tuple[int, ...] | None = None) -> Edit:
    return Edit(method=method, select=(f"state.{method}",), layers=layers, options={"num_tokens": num_tokens})


def adapted_with(case: Case, *edits: Edit) -> Any:
    adapted = attach(tiny_model(case), make_plan(tiny_model(case), Recipe(name="virtual", edits=edits)))
    randomise(adapted, scale=0.5)
    return adapted.eval()


def reference_logits(case: Case, adapted: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the untouched base, given embeddings with the positions in front, and layers that overwrite them."""
    model = tiny_model(case)
    embeds = model.get_input_embeddings()(tokens)
    backbone = backbone_of(model, get_family(case[0]))
    front = torch.zeros(1, NUM_TOKENS, embeds.shape[-1])
    for key, edit in adapted.edits.items():
        if key == f"{backbone}.prompt":
            front = edit()[None]
            continue

        def overwrite(layer: Any, args: Any, kwargs: Any, edit: Any = edit) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            own = edit().expand(hidden.shape[0], -1, -1)
            return (torch.cat([own, hidden[:, NUM_TOKENS:]], dim=1), *args[1:]), kwargs

        model.get_submodule(key.removesuffix(".prefix")).register_forward_pre_hook(overwrite, with_kwargs=True)
    embeds = torch.cat([front.expand(len(tokens), -1, -1), embeds], dim=1)
    logits: torch.Tensor = model(inputs_embeds=embeds, use_cache=False).logits
    return logits[:, NUM_TOKENS:]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("case", MODELS, ids="-".join)
def test_equals_the_positions_put_into_the_row(case: Case, method: str) -> None:
    """Outputs, and gradients of the positions."""
    tokens = tiny_tokens(case, 2, 9)
    adapted = adapted_with(case, edit_of(method))
    expected = reference_logits(case, adapted, tokens)
    found = adapted(input_ids=tokens, use_cache=False).logits
    assert_same_logits(found.detach(), expected.detach(), adapted, tokens)
    assert_same_gradients(found, expected, list(adapted.trained_parameters().values()))


def test_embeddings_in_place_of_tokens_get_the_same_prompt() -> None:
    case = ("granite_hybrid", "dense")
    tokens = tiny_tokens(case, 2, 9)
    adapted = adapted_with(case, edit_of("prompt"))
    embeds = tiny_model(case).get_input_embeddings()(tokens).detach()
    with torch.no_grad():
        found = adapted(inputs_embeds=embeds, use_cache=False).logits
    assert torch.equal(found, logits_of(adapted, tokens))


def test_insertion_puts_positions_before_the_first_token_of_every_document() -> None:
    x = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    virtual = torch.tensor([-1, -2])
    documents = Insertion(2, torch.ones_like(x), torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]))
    packed = documents.lengthen(x, virtual)
    assert packed.tolist() == [[-1, -2, 1, 2, 3, 4, 5, 0, 0], [-1, -2, 6, 7, -1, -2, 8, 9, 10]]
    assert torch.equal(documents.shorten(packed), x)
    padded = Insertion(2, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]), None)
    assert padded.lengthen(x, virtual).tolist() == [[1, 2, -1, -2, 3, 4, 5], [-1, -2, 6, 7, 8, 9, 10]]
    assert padded.before(x).tolist() == [3, 3, 6, 6]


def test_loss_is_that_of_the_real_tokens() -> None:
    case = ("granite_hybrid", "dense")
    tokens = tiny_tokens(case, 2, 9)
    adapted = adapted_with(case, edit_of("prompt"))
    logits = reference_logits(case, adapted, tokens)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert largest_difference(found.detach(), expected.detach()) <= LOGITS_FP32


def test_checkpointing_keeps_a_prompt_and_refuses_a_prefix() -> None:
    case = ("granite_hybrid", "dense")
    tokens = tiny_tokens(case, 2, 9)
    for method in ("prompt", "prefix"):
        adapted = adapted_with(case, edit_of(method)).train()
        parameters = list(adapted.trained_parameters().values())
        plain = torch.autograd.grad(adapted(input_ids=tokens, labels=tokens, use_cache=False).loss, parameters)
        adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        if method == "prefix":
            with pytest.raises(AttachError, match="Switch checkpointing off"):
                adapted(input_ids=tokens, labels=tokens, use_cache=False)
            continue
        again = torch.autograd.grad(adapted(input_ids=tokens, labels=tokens, use_cache=False).loss, parameters)
        assert torch.equal(again[0], plain[0])


def test_a_prefix_on_some_layers_leaves_the_others_to_the_model() -> None:
    case = ("granite_hybrid", "dense")
    tokens = tiny_tokens(case, 1, 7)
    adapted = adapted_with(case, edit_of("prefix", layers=(1,)))
    expected = reference_logits(case, adapted, tokens)
    assert_same_logits(logits_of(adapted, tokens), expected.detach(), adapted, tokens)


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ((edit_of("prompt"), edit_of("prefix")), "a prompt and prefixes"),
        ((edit_of("prefix", 2, (0,)), edit_of("prefix", 3, (1,))), r"prefixes of \[2, 3\]"),
    ],
)
def test_two_sets_of_positions_are_refused(edits: tuple[Edit, ...], found: str) -> None:
    model = tiny_model(("granite_hybrid", "dense"))
    plan = make_plan(model, Recipe(name="virtual", edits=edits))
    with pytest.raises(AttachError, match=found):
        attach(model, plan)
    assert not any("prompt" in name or "prefix" in name for name, _ in model.named_modules())


def test_inputs_that_cannot_be_made_longer_are_refused() -> None:
    case = ("granite_hybrid", "dense")
    tokens = tiny_tokens(case, 1, 4)
    adapted = adapted_with(case, edit_of("prompt"))
    with pytest.raises(AttachError, match=r"a mask of shape \(1, 1, 4, 4\)"):
        adapted(input_ids=tokens, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(AttachError, match=r"position_ids of shape \(3, 1, 4\)"):
        adapted(input_ids=tokens, position_ids=torch.arange(4).expand(3, 1, 4))


def test_padding_that_fills_the_first_chunk_is_refused() -> None:
    case = ("granite_hybrid", "dense")
    tokens, mask = tiny_tokens(case, 2, 4), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    adapted = adapted_with(case, edit_of("prompt"))
    with torch.no_grad():
        cache = cache_of(case, adapted(input_ids=tokens[:, :2], attention_mask=mask[:, :2], use_cache=True))
        with pytest.raises(AttachError, match="all 2 steps that the cache holds of a row are padding"):
            adapted(input_ids=tokens[:, 2:], attention_mask=mask, **cached(case, cache))


def test_a_model_off_this_path_is_refused_with_the_reason() -> None:
    with pytest.raises(PlacementError, match="RWKV, RecurrentGemma, S4D, xLSTM and multimodal models are not served"):
        make_plan(tiny_model(("rwkv", "dense")), "prompt")
