"""Gated delta layers and the attention beside them: each role's tensor, or rows of one, feed what the role says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts.tiny import CASES, Case, assert_same_logits, logits_of, tiny_inventory, tiny_model, tiny_tokens
from tolerances import LOGITS_FP32, largest_difference

from ssmtune.families.base import get_family
from ssmtune.inventory import Component
from ssmtune.operations import install_operations, recurrent_modules
from ssmtune.ops.seam import Call, rebind, restore

DELTA_CASES = [case for case in CASES if any(c.role == "gdn.A_log" for c in tiny_inventory(case).components)]
INPUTS = {
    "q": "query",
    "k": "key",
    "v": "value",
    "b": "beta",
    "a": "g",
    "z": "gate",
    "A_log": "g",
    "dt_bias": "g",
}
every_delta_case = pytest.mark.parametrize("case", DELTA_CASES, ids="-".join)


def parts_of(case: Case, prefix: str) -> list[Component]:
    """The named row ranges, and the tensors that have none, whose role starts with `prefix`."""
    inventory = tiny_inventory(case)
    split = {segment.path for segment in inventory.segments}
    parts = [c for c in (*inventory.components, *inventory.segments) if c.rows is not None or c.path not in split]
    return [c for c in parts if c.role.startswith(prefix)]


def disturb(model: Any, part: Component) -> None:
    tensor = model.get_parameter(part.path)
    with torch.no_grad():
        for first, end in part.rows or ((0, len(tensor)),):
            tensor[first:end] += 1 + torch.rand(tensor[first:end].shape, generator=torch.Generator().manual_seed(3))


def inputs_of_rule(case: Case, module: Any) -> dict[str, torch.Tensor]:
    """What the delta rule and the gated norm of one layer are given."""
    seen: dict[str, torch.Tensor] = {}
    operations = dict(get_family(case[0]).operations(module, Call()))  # type: ignore[misc]
    (name,) = (name for name in operations if name.startswith(("torch_chunk", "chunk_")))
    rule = operations[name]

    def watching(query: Any, key: Any, value: Any, *, g: Any, beta: Any, **options: Any) -> Any:
        seen.update(query=query, key=key, value=value, g=g, beta=beta)
        return rule(query, key, value, g=g, beta=beta, **options)

    norm = module.get_submodule("norm" if hasattr(module, "norm") else "o_norm")
    hook = norm.register_forward_pre_hook(lambda _, args: seen.update(gate=args[1]))
    rebind(module, {**operations, name: watching})
    width = module.hidden_size
    with torch.no_grad():
        module(torch.randn(1, 7, width, generator=torch.Generator().manual_seed(5)))
    restore(module)
    hook.remove()
    return seen


@every_delta_case
def test_each_part_reaches_its_input_of_the_rule_alone(case: Case) -> None:
    family = get_family(case[0])
    parts = parts_of(case, "gdn.")
    checked = set()
    for part in parts:
        name = part.role.removeprefix("gdn.in.").removeprefix("gdn.conv.").removeprefix("gdn.").partition(".")[0]
        if name not in INPUTS:
            assert part.role in ("gdn.norm", "gdn.out"), part
            continue
        model = tiny_model(case)
        owner = max(
            (path for path, m in model.named_modules() if m in recurrent_modules(model, family)),
            key=lambda path: part.path.startswith(path + "."),
        )
        before = inputs_of_rule(case, model.get_submodule(owner))
        disturb(model, part)
        after = inputs_of_rule(case, model.get_submodule(owner))
        assert {key for key in before if not torch.equal(before[key], after[key])} == {INPUTS[name]}, part
        checked.add(INPUTS[name])
    assert checked == {"query", "key", "value", "g", "beta", "gate"}


GATED = [case for case in DELTA_CASES if parts_of(case, "attn.q.gate")]
LATENT = [case for case in DELTA_CASES if parts_of(case, "attn.kv.latent")]


@pytest.mark.parametrize("case", GATED, ids="-".join)
def test_query_rows_reach_the_query_and_gate_rows_do_not(case: Case) -> None:
    for part in parts_of(case, "attn.q."):
        model = tiny_model(case)
        attention = model.get_submodule(part.path.rpartition(".q_proj")[0])
        seen: list[torch.Tensor] = []
        attention.q_norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        first = logits_of(model, tiny_tokens(case, 1, 7))
        disturb(model, part)
        second = logits_of(model, tiny_tokens(case, 1, 7))
        assert not torch.equal(first, second)
        changed = (seen[0] != seen[1]).flatten(0, 1)
        assert bool(changed.any()) == ("query" in part.role), part
        # Every channel of every head is fed by these rows.
        assert not changed.any() or bool(changed.any(0).all()), part


@pytest.mark.parametrize("case", LATENT, ids="-".join)
def test_rows_of_the_latent_projections_split_keys_from_values(case: Case) -> None:
    for part in (p for p in parts_of(case, "attn.") if "kv_b_proj" in p.path):
        model = tiny_model(case)
        attention = model.get_submodule(part.path.rpartition(".kv_b_proj")[0])
        generator = torch.Generator().manual_seed(5)
        latent = torch.randn(1, 1, 5, attention.kv_lora_rank, generator=generator)
        shared = torch.randn(1, 1, 5, attention.qk_rope_head_dim, generator=generator)
        with torch.no_grad():
            before = attention.expand_kv(latent, shared)
            disturb(model, part)
            after = attention.expand_kv(latent, shared)
        changed = [bool((one != other).any()) for one, other in zip(before, after, strict=True)]
        assert changed == [part.role == "attn.k", part.role == "attn.v"], part


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_images_pass_through_the_adapted_layers_as_through_the_untouched(name: str) -> None:
    """An image of 4 tokens inside a text; the packing hook sees its stacked positions."""
    case = ("qwen3_5_multimodal", name)
    tokens = tiny_tokens(case, 1, 12).clamp(max=92)
    tokens[0, 3:7] = tiny_model(case).config.image_token_id
    inputs = {
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == tiny_model(case).config.image_token_id).int(),
    }
    expected = logits_of(tiny_model(case), tokens, **inputs)
    model = tiny_model(case)
    install_operations(model, get_family(case[0]))
    assert largest_difference(logits_of(model, tokens, **inputs), expected) <= LOGITS_FP32
    inputs["pixel_values"] = -inputs["pixel_values"]
    assert largest_difference(logits_of(model, tokens, **inputs), expected) > 100 * LOGITS_FP32


def test_stacked_positions_keep_documents_apart() -> None:
    """Positions [4, B, T], as processors of images give them: the first plane tells the documents apart."""
    case = ("qwen3_5_multimodal", "dense")
    model = tiny_model(case)
    install_operations(model, get_family(case[0]))
    tokens = tiny_tokens(case, 1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    found = logits_of(model, tokens, position_ids=positions.expand(4, 1, -1), use_cache=False)
    alone = torch.cat([logits_of(model, tokens[:, :5]), logits_of(model, tokens[:, 5:])], dim=1)
    assert_same_logits(found, alone, model, tokens)


@every_delta_case
def test_packed_rows_shorter_than_the_convolution_fit_a_new_cache(case: Case) -> None:
    """A cache pads a first row that is shorter than the convolution; documents still stay apart."""
    model = tiny_model(case)
    install_operations(model, get_family(case[0]))
    tokens = tiny_tokens(case, 1, 2)
    packed = logits_of(model, tokens, position_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    alone = torch.cat([logits_of(model, tokens[:, :1]), logits_of(model, tokens[:, 1:])], dim=1)
    assert_same_logits(packed, alone, model, tokens)
