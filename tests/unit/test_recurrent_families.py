"""What the operations of single families repair beyond the contracts: caches of odd width, repeated calls, recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts.tiny import assert_same_logits, loss_of, tiny_config, tiny_model, tiny_tokens
from tolerances import LOGITS_FP32, largest_difference
from transformers import RwkvConfig, RwkvForCausalLM

from ssmtune.attach import attach
from ssmtune.errors import AttachError, UnsupportedModel
from ssmtune.families.base import get_family
from ssmtune.inventory import take_inventory
from ssmtune.models import weightless
from ssmtune.operations import install_operations
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe


@contextmanager
def _running(model: Any, family: str) -> Iterator[Any]:
    installed = install_operations(model, get_family(family))
    try:
        yield model
    finally:
        installed.remove()


def test_rwkv_decodes_with_keys_wider_than_the_hidden_state() -> None:
    """transformers gives the sums the hidden width and fails as soon as there is a cache."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=50, hidden_size=24, attention_hidden_size=36, num_hidden_layers=2)
    model = RwkvForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (2, 9))
    with pytest.raises(RuntimeError), torch.no_grad():
        model(tokens, use_cache=True)
    with _running(model, "rwkv"), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        first = model(tokens[:, :5], use_cache=True)
        second = model(tokens[:, 5:], state=first.state, use_cache=True)
    found = torch.cat([first.logits, second.logits], dim=1)
    assert largest_difference(found, expected) <= LOGITS_FP32


def test_rwkv_weights_are_those_of_the_checkpoint_after_an_evaluation() -> None:
    """transformers divides output weights in place when it evaluates; an adapter would be trained on the divided ones."""
    model = tiny_model(("rwkv", "rescaled"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = tiny_tokens(("rwkv", "rescaled"), 1, 5)
    with torch.no_grad():
        expected = model(tokens).logits
        divided = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
        assert len(divided) == 2
        with _running(model, "rwkv"):
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
            for _ in range(2):
                assert largest_difference(model(tokens).logits, expected) <= LOGITS_FP32
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert largest_difference(model(tokens).logits, expected) <= LOGITS_FP32


def test_recurrent_gemma_keeps_two_caches_apart() -> None:
    """transformers keeps the recurrent states on the layers, so that a second sequence overwrites the first one's."""
    case = ("recurrent_gemma", "dense")
    one, two = tiny_tokens(case, 1, 12, seed=1), tiny_tokens(case, 1, 12, seed=2)
    with _running(tiny_model(case), "recurrent_gemma") as model, torch.no_grad():
        expected = model(one, use_cache=False).logits[:, 7:]
        first = model(one[:, :7], use_cache=True)
        model(two, use_cache=True)
        second = model(one[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert largest_difference(second.logits, expected) <= LOGITS_FP32


@pytest.mark.parametrize(
    "case",
    [("rwkv", "dense"), ("recurrent_gemma", "dense"), ("lfm2", "biases"), ("xlstm", "dense")],
    ids="-".join,
)
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_recomputed_layers_see_their_own_call(case: tuple[str, str], kind: str) -> None:
    """Two forwards before the backward, as preference losses make them, with gradient checkpointing."""
    calls: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
        "packed": lambda n: {"position_ids": torch.cat([torch.arange(n), torch.arange(9 - n)])[None]},
        "padded": lambda n: {"attention_mask": (torch.arange(9) >= n).long()[None]},
    }
    grads = []
    for checkpointed in (False, True):
        with _running(tiny_model(case).train(), case[0]) as model:
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": False})
            total = torch.zeros(())
            for n in (2, 5):
                logits = model(tiny_tokens(case, 1, 9, seed=n), use_cache=False, **calls[kind](n)).logits
                total = total + logits[:, 5:].logsumexp(-1).sum()
            total.backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        # Relative to the gradient's own size: a layer that saw the other call's documents is off by tens of percents.
        assert largest_difference(grads[1][name], expected) <= LOGITS_FP32, name


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "lfm2", "s4d", "xlstm"])
def test_a_row_may_begin_in_the_second_chunk(family: str) -> None:
    """Left padding longer than the first chunk: what the cache holds of that row then is no sequence yet."""
    case = (family, "dense")
    lengths, width, cut = (3, 8, 11), 11, 5
    documents = [tiny_tokens(case, 1, n, seed=n) for n in lengths]
    ids = torch.full((len(lengths), width), 42)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for index, document in enumerate(documents):
        ids[index, -document.shape[1] :], mask[index, -document.shape[1] :] = document[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    name = get_family(family).cache
    with _running(tiny_model(case), family) as model, torch.no_grad():
        first = model(ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut], use_cache=True)
        second = model(
            ids[:, cut:], attention_mask=mask, position_ids=positions[:, cut:], use_cache=True, **{name: first[name]}
        )
        for index, document in enumerate(documents):
            expected = model(document, use_cache=False).logits[0]
            found = torch.cat([first.logits, second.logits], dim=1)[index, -document.shape[1] :]
            assert_same_logits(found, expected, model, document)


@pytest.mark.parametrize(
    "case",
    [("llama", "dense"), ("mistral", "sliding"), ("qwen3", "sliding"), ("gemma", "dense"), ("lfm2", "biases")]
    + [("recurrent_gemma", "dense"), ("rwkv", "dense"), ("s4d", "dense"), ("xlstm", "dense")],
    ids="-".join,
)
def test_packed_documents_stay_apart_where_a_cache_is_filled(case: tuple[str, str]) -> None:
    """`use_cache` is on by default, and transformers' masks then ignore restarting position ids."""
    tokens = tiny_tokens(case, 1, 14)
    positions = torch.cat([torch.arange(n) for n in (2, 5, 7)])[None]
    with _running(tiny_model(case), case[0]) as model, torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=True).logits[0]
        alone = [model(part, use_cache=False).logits[0] for part in tokens.split([2, 5, 7], dim=1)]
    assert largest_difference(packed, torch.cat(alone)) <= LOGITS_FP32


def test_xlstm_refuses_what_would_not_reach_its_layers() -> None:
    """A cache that is written in place, and documents or padding in rows that transformers runs in pieces."""
    case = ("xlstm", "dense")
    model = tiny_model(case)
    tokens = tiny_tokens(case, 1, 9)
    plain = model(tokens, use_cache=True).cache_params
    with _running(model, "xlstm"), torch.no_grad():
        with pytest.raises(AttachError, match="cache_params of class xLSTMCache.*Pass none"):
            model(tokens, cache_params=plain)
        expected = model(tokens, use_cache=False).logits
        model.config.max_inference_chunksize = 4
        assert_same_logits(model(tokens, use_cache=False).logits, expected, model, tokens)
        with pytest.raises(AttachError, match=r"9 steps .*config\.max_inference_chunksize=4 in pieces"):
            model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))


def test_zamba_gives_every_head_its_own_channels_of_a_state() -> None:
    """With only the second of three heads let through, only its channels of what is added to the recurrence learn."""
    case = ("zamba", "odd")
    model = tiny_model(case)
    mixer = model.model.layers[1].mamba
    seen = slice(mixer.mamba_head_dim, 2 * mixer.mamba_head_dim)
    with torch.no_grad():
        kept = mixer.out_proj.weight[:, seen].clone()
        mixer.out_proj.weight.zero_()[:, seen] = kept
    states = {"initial_state": "initial_state", "state_offset_h": "state_offset", "state_offset_y": "output_offset"}
    edits = tuple(Edit(method=method, select=(f"state.{name}",)) for method, name in states.items())
    adapted = attach(model, make_plan(model, Recipe(name="states", edits=edits)))
    loss_of(adapted, tiny_tokens(case, 2, 9)).backward()
    for name in states.values():
        gradient = adapted.edits[f"model.layers.1.mamba.{name}"].value.grad
        learns = gradient.ne(0).flatten(1).any(1) if gradient.dim() > 1 else gradient.ne(0)
        assert learns.nonzero().flatten().tolist() == list(range(seen.start, seen.stop)), name


def test_xlstm_refuses_the_layers_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(("xlstm", "dense"))
    monkeypatch.setattr(type(model.backbone.blocks[0]), "__module__", "xlstm.xlstm_large.model")
    with pytest.raises(UnsupportedModel, match="the package 'xlstm'.*Uninstall"):
        install_operations(model, get_family("xlstm"))
    with pytest.raises(UnsupportedModel, match="weight_mode='fused'"):
        take_inventory(weightless(replace(tiny_config(("xlstm", "dense")), weight_mode="fused")))
