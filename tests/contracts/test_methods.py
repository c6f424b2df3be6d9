"""Every method on every family and role that it allows, enrolled by the files found; and whole recipes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import (
    CASE_IDS,
    CASES,
    Case,
    assert_same_logits,
    cache_of,
    cached,
    logits_of,
    loss_of,
    move,
    randomise,
    tiny_config,
    tiny_inventory,
    tiny_model,
    tiny_tokens,
)
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from tolerances import LOGITS_FP32, LOGITS_MERGED, PLAIN_FORWARD, largest_difference

from ssmtune.attach import attach, load
from ssmtune.component import Component
from ssmtune.errors import AttachError, PlacementError, PlanMismatch
from ssmtune.inventory import Inventory
from ssmtune.merge import merge
from ssmtune.methods.base import get_method, method_names
from ssmtune.models import auto_class
from ssmtune.packing import PackedCollator
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.recipe import Edit, Recipe

Company = tuple[str, Case, str]
"""A method, a case, and "whole" tensors or "rows": every role that the method allows there, in one plan."""


def whole_components(inventory: Inventory) -> tuple[Component, ...]:
    return (*inventory.components, *inventory.states, *inventory.blocks)


def allowed_roles(method: str, case: Case, part: str) -> list[str]:
    inventory = tiny_inventory(case)
    among = whole_components(inventory) if part == "whole" else inventory.segments
    return sorted({c.role for c in among if get_method(method).allows(c)})


EVERYWHERE = ("lora", "core")
"""Methods that meet every config of every family; the others meet every family, in the configs that have their roles."""


BEFORE_THE_TEXT = ("prompt", "prefix")
ONE_OF_EACH_KIND = ("falcon_h1", "granite_hybrid", "llama", "mamba", "qwen3_next")
"""Families in which a method that never meets a layer's inside is tried; `PROMPTED` runs it in all."""
LIKE_HANKEL = {"parallel": ("llama", "granite_hybrid"), "hankel_reduced": ("llama", "granite_hybrid")}
"""Branches that sit where `hankel` does, which meets every family: a plain and a hybrid one are enough for what differs."""
LIKE_LORA = {"adalora": ("falcon_h1", "llama", "mamba", "olmo_hybrid", "rwkv")}
"""Edits of the tensors that `lora` edits in every family. Packed matrices, which `adalora` refuses, are in none."""


def companies(method: str, part: str) -> Iterator[Company]:
    """The cases that the method is tried on: as few of each family as show every role that it allows there."""
    for family, members in itertools.groupby(CASES, key=lambda case: case[0]):
        if method in BEFORE_THE_TEXT and family not in ONE_OF_EACH_KIND:
            continue
        if family not in (LIKE_HANKEL | LIKE_LORA).get(method, (family,)):
            continue
        roles = {case: set(allowed_roles(method, case, part)) for case in members}
        if method in EVERYWHERE:
            yield from ((method, case, part) for case in roles if roles[case])
            continue
        missing = set().union(*roles.values())
        while missing:
            case = max(roles, key=lambda case: len(roles[case] & missing))
            yield method, case, part
            missing -= roles[case]


COMPANIES: tuple[Company, ...] = tuple(
    company for method in method_names() for part in ("whole", "rows") for company in companies(method, part)
)
COMPANY_IDS = tuple(f"{method}-{'-'.join(case)}-{part}" for method, case, part in COMPANIES)

HAS_CORE = {case: any(c.group == "core" for c in tiny_inventory(case).components) for case in CASES}
FIRST_CASES = {family: next(case for case in CASES if case[0] == family) for family, _ in CASES}
# One config of each family carries every recipe; the others differ in shapes and switches, which the fullest covers.
RECIPES = {
    case: ("all",)
    if not HAS_CORE[case]
    else ("all", "all+core", "core")
    if FIRST_CASES[case[0]] == case
    else ("all+core",)
    for case in CASES
}
WHOLES = tuple((recipe, case) for case in CASES for recipe in RECIPES[case])
WHOLE_IDS = tuple(f"{recipe}-{'-'.join(case)}" for recipe, case in WHOLES)
every_whole = pytest.mark.parametrize(("recipe", "case"), WHOLES, ids=WHOLE_IDS)
FULLEST = tuple(("all+core" if HAS_CORE[case] else "all", case) for case in CASES)
every_fullest = pytest.mark.parametrize(("recipe", "case"), FULLEST, ids=CASE_IDS)


@lru_cache
def company_plan(company: Company) -> Plan:
    method, case, _ = company
    edits = tuple(Edit(method=method, select=(role,)) for role in allowed_roles(*company))
    return make_plan(tiny_model(case), Recipe(name="contract", edits=edits))


STATES = tuple(
    (method, f"state.{name}")
    for method, name in (
        ("initial_state", "initial_state"),
        ("state_offset_h", "state_offset"),
        ("state_offset_y", "output_offset"),
        ("affix", "affix"),
        ("additional_scan", "additional_scan"),
        ("memba", "membrane"),
    )
)
"""Everything that can be added to a recurrence at once, beside LoRA: the recipe "states" of these tests."""


@lru_cache
def whole_plan(recipe: str, case: Case) -> Plan:
    if recipe == "branches":
        roles = sorted({block.role for block in tiny_inventory(case).blocks})
        # Real modes beside one kind of block and complex ones beside the other, next to LoRA inside the same blocks.
        edits = tuple(
            Edit(method="hankel", select=(role,), options={"order": 6, "complex_modes": role == "block.mlp"})
            for role in roles
        )
        edits += (Edit(method="lora", select=("mlp",)),)
        return make_plan(tiny_model(case), Recipe(name="branches", edits=edits))
    if recipe == "states":
        there = {c.role for c in tiny_inventory(case).states}
        # Chunks that end within the tests' short documents.
        options = {"memba": {"chunk": 3}}
        edits = tuple(
            Edit(method=method, select=(role,), options=options.get(method, {}))
            for method, role in STATES
            if role in there
        )
        edits += (Edit(method="lora", select=("mlp", "recurrent")),)
        return make_plan(tiny_model(case), Recipe(name="states", edits=edits))
    # A rank that no tiny model has as one of its sizes, so that a swapped axis changes the counts.
    return make_plan(tiny_model(case), recipe, rank=3, alpha=7.0)


def attached(plan: Plan, case: Case, *, dtype: torch.dtype = torch.float32, moved: bool = True) -> Any:
    adapted = attach(tiny_model(case, dtype=dtype), plan)
    if moved:
        randomise(adapted)
    return adapted


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One adapted model of a case, adapters moved, in eval mode, shared by the tests that only read it."""
    recipe, case = request.param
    adapted = attached(whole_plan(recipe, case), case, moved=False).eval()
    # Larger steps make some models amplify rounding past the bound that all paths are held to.
    randomise(adapted, scale=0.03)
    if recipe == "branches":
        open_gates(adapted)
    yield adapted


def open_gates(adapted: Any) -> None:
    """Let every branch act fully: a lost state must show."""
    with torch.no_grad():
        for name, parameter in adapted.edit_parameters().items():
            if name.endswith(".branch.gate"):
                parameter.fill_(3.0)


STATEFUL = tuple(("states", case) for case in FIRST_CASES.values() if tiny_inventory(case).states)
# Where the positions lie is the same piece of code for all; what differs is how a backbone takes masks and positions.
PROMPTED = tuple(
    ("prefix" if index % 4 == 0 else "prompt", case)
    for index, case in enumerate(FIRST_CASES.values())
    if any(state.role == "state.prompt" for state in tiny_inventory(case).states)
)
BRANCHED = tuple(("branches", case) for case in FIRST_CASES.values() if tiny_inventory(case).blocks)
RUNNING = (*FULLEST, *STATEFUL, *PROMPTED, *BRANCHED)
TRAINED = (*FULLEST, *(whole for whole in STATEFUL if whole[1][0] in ONE_OF_EACH_KIND))
every_trained = pytest.mark.parametrize(
    ("recipe", "case"), TRAINED, ids=["-".join((recipe, *case)) for recipe, case in TRAINED]
)
every_running = pytest.mark.parametrize(
    ("case", "running"),
    [(case, (recipe, case)) for recipe, case in RUNNING],
    ids=["-".join((recipe, *case)) for recipe, case in RUNNING],
    indirect=["running"],
    scope="module",
)


def first_gradients(adapted: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    adapted.zero_grad()
    loss_of(adapted, tokens).backward()
    return {name: p.grad for name, p in adapted.trained_parameters().items()}


DECLARED = tuple(name for method in method_names() for name in get_method(method).recipes)


@pytest.mark.parametrize("recipe", DECLARED)
def test_every_declared_recipe_fits_some_family(recipe: str) -> None:
    """A recipe in a method's file is planned, attached and counted on the first family that has what it selects."""
    for case in FIRST_CASES.values():
        try:
            plan = make_plan(tiny_model(case), recipe)
        except PlacementError:
            continue
        built = sum(p.numel() for p in attached(plan, case, moved=False).trained_parameters().values())
        assert built == plan.trainable > 0
        return
    pytest.fail(f"recipe {recipe!r} fits no family")


def test_every_method_is_enrolled() -> None:
    assert {method for method, _, _ in COMPANIES} == set(method_names())
    for name in method_names():
        method = get_method(name)
        assert method.in_module or any((method.make_edit, method.make_state, method.make_branch))
        assert method.summary and method.formula and method.source and method.overhead
        method.Options()  # every field has a default


@pytest.fixture(scope="module")
def fresh(request: pytest.FixtureRequest) -> Any:
    """A company attached and not moved, shared by tests that put back what they change."""
    company: Company = request.param
    return attached(company_plan(company), company[1], moved=False).eval()


every_company = pytest.mark.parametrize(
    ("company", "fresh"), [(c, c) for c in COMPANIES], ids=COMPANY_IDS, indirect=["fresh"], scope="module"
)


@every_company
def test_starts_as_the_identity(company: Company, fresh: Any) -> None:
    method, case, _ = company
    tokens = tiny_tokens(case, 2, 17)
    expected = logits_of(tiny_model(case), tokens)
    with fresh.disable_adapter():
        off = logits_of(fresh, tokens)
        limit = PLAIN_FORWARD.get(case[0], LOGITS_FP32)
        assert_same_logits(off, expected, fresh, tokens, limit)
    if not get_method(method).starts_as_base:
        assert largest_difference(logits_of(fresh, tokens), expected) > 10 * LOGITS_MERGED
        return
    # At its start an adapter adds exactly zero: on and off are the same bits.
    assert torch.equal(logits_of(fresh, tokens), off)


@every_company
def test_counts_are_those_of_the_built_model(company: Company, fresh: Any) -> None:
    method_name, case, part = company
    plan = fresh.plan
    inventory = tiny_inventory(case)
    among = whole_components(inventory) if part == "whole" else inventory.segments
    method = get_method(method_name)
    assert {(s.path, s.rows) for s in plan.sites} == {(c.path, c.rows) for c in among if method.allows(c)}
    assert len({s.key for s in plan.sites}) == len(plan.sites)
    built = {name: p.numel() for name, p in fresh.trained_parameters().items()}
    assert sum(built.values()) == plan.trainable
    requiring = {id(p) for p in fresh.parameters() if p.requires_grad}
    assert requiring == {id(p) for p in fresh.trained_parameters().values()}
    for entry in plan.sites:
        assert entry.num_params == method.num_params(entry.shape, method.Options(**entry.options))
    for name in fresh.trained_parameters():
        assert fresh.optimizer_group(name) == method.optimizer_group


@every_company
def test_every_trained_tensor_learns(company: Company, fresh: Any) -> None:
    """Finite, non-zero gradients; what a factor of zero multiplies waits for the second step, a branch for its gate."""
    tokens = tiny_tokens(company[1], 2, 17)
    parameters = fresh.trained_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    fresh.train()
    for step in range(2):
        for name, gradient in first_gradients(fresh, tokens).items():
            assert gradient is not None, name
            assert bool(torch.isfinite(gradient).all()), name
            waits = any(part in name for part in get_method(company[0]).waits)
            if step == 1 or not (waits or (".branch." in name and not name.endswith(".gate"))):
                assert bool(gradient.any()), name
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.sub_(0.1 * parameter.grad)
    fresh.eval()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])


@every_company
def test_every_site_acts_on_the_output(company: Company, fresh: Any) -> None:
    """One site at a time is moved: its tensors alone change the logits."""
    tokens = tiny_tokens(company[1], 2, 17)
    before = logits_of(fresh, tokens)
    parameters = fresh.trained_parameters()
    for site in fresh.plan.sites:
        own = {name: p for name, p in parameters.items() if of_site(name, site)}
        start = {name: p.detach().clone() for name, p in own.items()}
        assert own, site.key
        # A branch's steps are short, so what it adds starts small.
        move(own, scale=1.0 if site.container == "branch" else 0.1 * spread(site))
        changed = largest_difference(logits_of(fresh, tokens), before)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(start[name])
        assert changed > 10 * LOGITS_MERGED, f"{site.key} does not act"
    assert torch.equal(logits_of(fresh, tokens), before)


def spread(site: Any) -> float:
    """How much further each number has to move where only some of a tensor's entries train, to move the tensor as far."""
    sparse = get_method(site.method).value_kind == "sparse"
    return float(math.sqrt(math.prod(site.shape) / site.num_params)) if sparse else 1.0


def of_site(name: str, site: Any) -> bool:
    """Whether a trained parameter belongs to a site; PEFT keeps all packed experts of a module under one name."""
    if site.container != "module":
        return name == site.key or name.startswith(f"{site.key}.")
    module = site.path.removesuffix(".weight") if len(site.shape) == 2 else site.path.rpartition(".")[0]
    return name.removeprefix("base_model.model.").replace(".base_layer", "").startswith(f"{module}.lora_")


@pytest.mark.parametrize("company", COMPANIES, ids=COMPANY_IDS)
def test_merged_equals_adapted_at_every_role(company: Company) -> None:
    method_name, case, _ = company
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(company_plan(company), case, moved=False).eval()
    if not get_method(method_name).mergeable:
        with pytest.raises(AttachError):
            merge(adapted)
        return
    # Every role at once: larger steps would make models that amplify rounding a thousandfold.
    randomise(adapted, scale=0.01 * max(spread(site) for site in adapted.plan.sites))
    expected = logits_of(adapted, tokens)
    assert largest_difference(expected, logits_of(tiny_model(case), tokens)) > 10 * LOGITS_MERGED
    merged = merge(adapted)
    assert type(merged) is type(tiny_model(case))
    limit = PLAIN_FORWARD.get(case[0], LOGITS_MERGED)
    assert_same_logits(logits_of(merged, tokens), expected, merged, tokens, limit)


@every_running
def test_adapted_token_by_token_equals_full_sequence(case: Case, running: Any) -> None:
    tokens = tiny_tokens(case, 2, 15)
    expected = logits_of(running, tokens)
    cache, pieces = None, []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = running(input_ids=tokens[:, t : t + 1], use_cache=True, **cached(case, cache))
            cache = cache_of(case, out)
            pieces.append(out.logits)
        first = running(input_ids=tokens[:, :6], use_cache=True)
        second = running(input_ids=tokens[:, 6:], use_cache=True, **cached(case, cache_of(case, first)))
    assert_same_logits(torch.cat(pieces, dim=1), expected, running, tokens)
    assert_same_logits(torch.cat([first.logits, second.logits], dim=1), expected, running, tokens)


@every_running
def test_adapted_generates_the_greedy_tokens(case: Case, running: Any) -> None:
    prompt = tiny_tokens(case, 1, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = running.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    tokens = prompt
    for _ in range(6):
        logits = logits_of(running, tokens)[:, -1].clone()
        logits[:, tiny_config(case).get_text_config().eos_token_id] = -torch.inf  # what min_new_tokens does
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)


@every_running
def test_adapted_packed_equals_separate(case: Case, running: Any) -> None:
    lengths = [4, 1, 9, 3]
    ids = tiny_tokens(case, sum(lengths)).tolist()
    batch = PackedCollator(pad_token_id=0, multiple_of=8)([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])
    packed = logits_of(running, batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    start = 0
    for length in lengths:
        document = batch["input_ids"][:, start : start + length]
        assert_same_logits(packed[:, start : start + length], logits_of(running, document), running, document)
        start += length


@pytest.mark.parametrize("side", ["left", "right"])
@every_running
def test_adapted_padding_changes_nothing(case: Case, running: Any, side: str) -> None:
    document = tiny_tokens(case, 1, 7)
    padding = torch.full((1, 5), 42)
    ids = torch.cat([padding, document] if side == "left" else [document, padding], dim=1)
    mask = torch.ones_like(ids)
    real = slice(5, None) if side == "left" else slice(0, 7)
    mask[:, slice(0, 5) if side == "left" else slice(7, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits_of(running, ids, attention_mask=mask, position_ids=positions)[:, real]
    assert_same_logits(found, logits_of(running, document), running, document)


@pytest.mark.parametrize(
    ("case", "running"),
    [(case, (recipe, case)) for recipe, case in (*STATEFUL, *PROMPTED)],
    ids=["-".join((recipe, *case)) for recipe, case in (*STATEFUL, *PROMPTED)],
    indirect=["running"],
    scope="module",
)
def test_adapted_steps_after_a_left_padded_prefill_equal_the_document_alone(case: Case, running: Any) -> None:
    """After prompts shorter than a convolution too: what a sequence starts from is in the cache, at the right place."""
    lengths, width, new = (1, 3, 9), 9, 2
    documents = [tiny_tokens(case, 1, n + new, seed=n) for n in lengths]
    ids = torch.full((len(lengths), width + new), 42)
    mask = torch.zeros(len(lengths), width + new, dtype=torch.long)
    for index, document in enumerate(documents):
        ids[index, -document.shape[1] :], mask[index, -document.shape[1] :] = document[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, found = None, []
    with torch.no_grad():
        for part in (slice(0, width), slice(width, width + 1), slice(width + 1, width + 2)):
            output = running(
                input_ids=ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                use_cache=True,
                **cached(case, cache),
            )
            cache = cache_of(case, output)
            found.append(output.logits)
    for index, document in enumerate(documents):
        logits = torch.cat(found, dim=1)[index, -document.shape[1] :]
        assert_same_logits(logits, logits_of(running, document)[0], running, document)


@every_whole
def test_training_leaves_the_frozen_tensors_alone(recipe: str, case: Case) -> None:
    adapted = attached(whole_plan(recipe, case), case, moved=False).train()
    trained = {id(p): name for name, p in adapted.trained_parameters().items()}
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if id(p) not in trained}
    frozen |= {name: b.clone() for name, b in adapted.named_buffers()}
    start = {name: p.detach().clone() for name, p in adapted.trained_parameters().items()}
    optimizer = torch.optim.AdamW(adapted.trained_parameters().values(), lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(adapted, tiny_tokens(case, 2, 17, seed=seed)).backward()
        optimizer.step()
    now = dict(adapted.named_parameters()) | dict(adapted.named_buffers())
    for name, value in frozen.items():
        assert torch.equal(now[name], value), name
    for name, parameter in adapted.trained_parameters().items():
        assert not torch.equal(parameter, start[name]), f"{name} did not move"


@every_whole
def test_saved_and_loaded_gives_the_same_bits(recipe: str, case: Case, tmp_path: Path) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).eval()
    expected = logits_of(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = load(tiny_model(case), tmp_path)
    assert loaded.plan == adapted.plan
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in tmp_path.iterdir() if p.is_file())
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@every_whole
def test_plain_peft_gives_the_same_or_fails_loudly(recipe: str, case: Case, tmp_path: Path) -> None:
    """Without extras stock PEFT must load the directory and give the same logits; with extras it must raise."""
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).eval()
    expected = logits_of(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    if adapted.edits:
        with pytest.raises((KeyError, ValueError, TypeError), match="SSMTUNE.*ssmtune.load"):
            PeftModel.from_pretrained(tiny_model(case), tmp_path)
        return
    if tiny_config(case).model_type in ("falcon_h1", "mamba2", "nemotron_h"):
        # Stock PEFT refuses their out_proj by name, since fused kernels would read past an adapter there.
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            PeftModel.from_pretrained(tiny_model(case), tmp_path)
        return
    stock = PeftModel.from_pretrained(tiny_model(case), tmp_path).eval()
    assert_same_logits(logits_of(stock, tokens), expected, stock, tokens, PLAIN_FORWARD.get(case[0], LOGITS_FP32))
    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert get_peft_model_state_dict(stock, save_embedding_layers=False).keys() == ours.keys()


@every_whole
def test_merged_equals_adapted_and_survives_a_save(recipe: str, case: Case, tmp_path: Path) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).eval()
    expected = logits_of(adapted, tokens)
    names = set(tiny_model(case).state_dict())
    merged = merge(adapted)
    assert set(merged.state_dict()) == names
    # Saved before it runs: transformers' RWKV divides weights in place when it evaluates, and would save the divided ones.
    merged.save_pretrained(tmp_path)
    saved = {name: value.clone() for name, value in merged.state_dict().items()}
    found = logits_of(merged, tokens)
    assert_same_logits(found, expected, merged, tokens, PLAIN_FORWARD.get(case[0], LOGITS_MERGED))
    reloaded = auto_class(merged.config).from_pretrained(tmp_path).eval()
    # The weights are the same bits. The logits may round differently: where a tensor starts in memory decides in which
    # order its products are summed.
    for name, value in saved.items():
        assert torch.equal(reloaded.state_dict()[name], value), name
    assert_same_logits(logits_of(reloaded, tokens), found, reloaded, tokens, PLAIN_FORWARD.get(case[0], LOGITS_FP32))


@every_fullest
def test_merge_touches_only_the_sites(recipe: str, case: Case) -> None:
    adapted = attached(whole_plan(recipe, case), case)
    edited = {site.path for site in adapted.plan.sites}
    merged = merge(adapted)
    before = dict(tiny_model(case).named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in edited), name


@every_fullest
def test_second_use_after_merge_is_refused(recipe: str, case: Case, tmp_path: Path) -> None:
    adapted = attached(whole_plan(recipe, case), case)
    merge(adapted)
    with pytest.raises(AttachError, match="cannot merge .* merged before"):
        merge(adapted)
    with pytest.raises(AttachError, match="cannot save"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(AttachError, match="cannot detach"):
        adapted.detach()
    assert not list(tmp_path.iterdir())


@every_fullest
def test_merged_model_takes_a_new_adapter(recipe: str, case: Case) -> None:
    """Merging clears every mark, so the next round of training can start from the merged model."""
    merged = merge(attached(whole_plan(recipe, case), case))
    tokens = tiny_tokens(case, 1, 9)
    expected = logits_of(merged, tokens)
    again = attach(merged, whole_plan(recipe, case)).eval()
    assert_same_logits(logits_of(again, tokens), expected, again, tokens, PLAIN_FORWARD.get(case[0], LOGITS_FP32))


@every_whole
def test_detach_restores_the_instance(recipe: str, case: Case) -> None:
    twin = tiny_model(case)
    model = tiny_model(case)
    layout = [(name, type(m), set(vars(m)), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    requiring = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = attach(model, whole_plan(recipe, case))
    randomise(adapted)
    loss_of(adapted, tiny_tokens(case, 1, 9)).backward()
    base = adapted.detach()
    assert base is model
    assert list(base.state_dict()) == list(twin.state_dict())
    for name, value in twin.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    assert {name: p.requires_grad for name, p in base.named_parameters()} == requiring
    found = [(name, type(m), set(vars(m)), len(m._forward_pre_hooks)) for name, m in base.named_modules()]
    for (name, *before), (other, *after) in zip(layout, found, strict=True):
        assert (name, *before) == (other, *after), name
    tokens = tiny_tokens(case, 2, 17)
    assert torch.equal(logits_of(base, tokens), logits_of(twin, tokens))


@every_fullest
def test_detach_restores_requires_grad_of_a_frozen_model(recipe: str, case: Case) -> None:
    """The model is given back as it came: a user who had frozen parts of it finds them frozen."""
    model = tiny_model(case)
    model.get_input_embeddings().weight.requires_grad_(False)
    requiring = {name: p.requires_grad for name, p in model.named_parameters()}
    base = attach(model, whole_plan(recipe, case)).detach()
    assert {name: p.requires_grad for name, p in base.named_parameters()} == requiring


@every_fullest
def test_tied_tensors_stay_tied(recipe: str, case: Case) -> None:
    inventory = tiny_inventory(case)
    merged = merge(attached(whole_plan(recipe, case), case))
    for name, owner in inventory.tied.items():
        assert merged.get_parameter(name) is merged.get_parameter(owner)


@every_fullest
def test_second_attach_is_refused(recipe: str, case: Case) -> None:
    plan = whole_plan(recipe, case)
    model = tiny_model(case)
    adapted = attach(model, plan)
    for again in (model, adapted):
        with pytest.raises(AttachError, match="already carries adapters"):
            attach(again, plan)


@every_fullest
def test_plan_of_another_model_is_refused_before_anything_is_touched(recipe: str, case: Case) -> None:
    other = next(c for c in CASES if c != case)
    model = tiny_model(other)
    layout = [(name, type(m), set(vars(m))) for name, m in model.named_modules()]
    with pytest.raises(PlanMismatch, match="Make a plan for this model"):
        attach(model, whole_plan(recipe, case))
    assert [(name, type(m), set(vars(m))) for name, m in model.named_modules()] == layout


@every_whole
def test_disabled_adapter_is_the_base(recipe: str, case: Case) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).eval()
    on = logits_of(adapted, tokens)
    with adapted.disable_adapter():
        off = logits_of(adapted, tokens)
    limit = PLAIN_FORWARD.get(case[0], LOGITS_FP32)
    assert_same_logits(off, logits_of(tiny_model(case), tokens), adapted, tokens, limit)
    assert torch.equal(logits_of(adapted, tokens), on)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {
        id(p) for p in adapted.trained_parameters().values()
    }


@every_trained
def test_checkpointing_gives_identical_gradients(recipe: str, case: Case) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).train()
    calls: list[int] = []
    path = next(c.path for c in tiny_inventory(case).components if c.layer == 0 and c.access == "module")
    first = adapted.get_base_model().get_submodule(path.rpartition(".")[0])
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = {name: g.clone() for name, g in first_gradients(adapted, tokens).items()}
    num_once = len(calls)
    adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    found = first_gradients(adapted, tokens)
    assert len(calls) == 3 * num_once > 0, "the layer was not run again, so nothing was checkpointed"
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@every_trained
def test_bf16_autocast_leaves_no_dead_tensor(recipe: str, case: Case) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).train()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = first_gradients(adapted, tokens)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.dtype == torch.float32, name
        assert bool(torch.isfinite(gradient).all()) and bool(gradient.any()), name


@every_fullest
def test_bf16_base_trains_fp32_adapters(recipe: str, case: Case) -> None:
    """The trained tensors are fp32, every one gets a gradient, and the base stays bf16 through training and merge."""
    adapted = attached(whole_plan(recipe, case), case, dtype=torch.bfloat16).train()
    assert {p.dtype for p in adapted.trained_parameters().values()} == {torch.float32}
    for name, gradient in first_gradients(adapted, tiny_tokens(case, 2, 17)).items():
        assert gradient is not None and bool(torch.isfinite(gradient).all()) and bool(gradient.any()), name
    merged = merge(adapted)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("case", [case for case in CASES if HAS_CORE[case]], ids="-".join)
def test_core_delta_reaches_the_scan_in_fp32(case: Case) -> None:
    """On a bf16 base a delta far below half a bf16 step of its weight must still change what the model computes."""
    adapted = attached(whole_plan("core", case), case, dtype=torch.bfloat16, moved=False)
    for path, edit in adapted.edits.items():
        with torch.no_grad():
            edit.trained()[""].fill_(1e-4)
        parent, _, name = path.rpartition(".")
        module = adapted.get_base_model().get_submodule(parent)
        effective = getattr(module, name)
        original = module.parametrizations[name].original
        assert effective.dtype == torch.float32 and original.dtype == torch.bfloat16
        assert torch.equal(effective, original.float() + 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if HAS_CORE[case]], ids="-".join)
def test_core_in_place_keeps_the_dtype_of_the_base(case: Case) -> None:
    """The control shows what in-place training does, so it must really be in bf16."""
    plan = make_plan(tiny_model(case), named_recipe("control:core-in-place", rank=3))
    adapted = attached(plan, case, dtype=torch.bfloat16, moved=False)
    copies = [adapted.edit_parameters()[site.key] for site in plan.sites if site.method == "core_in_place"]
    assert {p.dtype for p in copies} == {torch.bfloat16}


@every_fullest
def test_attach_gives_equal_models_for_equal_seeds(recipe: str, case: Case) -> None:
    """The start of LoRA's A is the only random number, and the seed decides it."""
    starts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        adapted = attached(whole_plan(recipe, case), case, moved=False)
        starts.append(torch.cat([p.detach().flatten() for p in adapted.trained_parameters().values()]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_attach_and_load_raise_no_warning(tmp_path: Path) -> None:
    recipe, case = FULLEST[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = attached(whole_plan(recipe, case), case)
        adapted.save_pretrained(tmp_path)
        load(tiny_model(case), tmp_path)
