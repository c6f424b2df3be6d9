"""Every method on every family and role that it allows, enrolled by the files found; and whole recipes."""

from __future__ import annotations

import itertools
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
    logits_of,
    loss_of,
    randomise,
    tiny_config,
    tiny_inventory,
    tiny_model,
    tiny_tokens,
)
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from tolerances import LOGITS_FP32, LOGITS_MERGED, largest_difference
from transformers import AutoModelForCausalLM

from ssmtune.attach import attach, load
from ssmtune.errors import AttachError, PlanMismatch
from ssmtune.merge import merge
from ssmtune.methods.base import get_method, method_names
from ssmtune.packing import PackedCollator
from ssmtune.placement import Edit, Recipe, named_recipe
from ssmtune.plan import Plan, make_plan

Site = tuple[str, Case, str]

SITES: tuple[Site, ...] = tuple(
    (method, case, role)
    for method, case in itertools.product(method_names(), CASES)
    for role in sorted({c.role for c in tiny_inventory(case).components} & get_method(method).allowed_roles)
)
SITE_IDS = tuple(f"{method}-{'-'.join(case)}-{role}" for method, case, role in SITES)
every_site = pytest.mark.parametrize("site", SITES, ids=SITE_IDS)

HAS_CORE = {case: any(c.group == "core" for c in tiny_inventory(case).components) for case in CASES}
RECIPES = {case: ("all", "all+core", "core") if HAS_CORE[case] else ("all",) for case in CASES}
WHOLES = tuple((recipe, case) for case in CASES for recipe in RECIPES[case])
WHOLE_IDS = tuple(f"{recipe}-{'-'.join(case)}" for recipe, case in WHOLES)
every_whole = pytest.mark.parametrize(("recipe", "case"), WHOLES, ids=WHOLE_IDS)
FULLEST = tuple((RECIPES[case][min(1, len(RECIPES[case]) - 1)], case) for case in CASES)
every_fullest = pytest.mark.parametrize(("recipe", "case"), FULLEST, ids=CASE_IDS)


@lru_cache
def site_plan(site: Site) -> Plan:
    method, case, role = site
    recipe = Recipe(name="contract", edits=(Edit(method=method, select=(role,)),))
    return make_plan(tiny_model(case), recipe)


@lru_cache
def whole_plan(recipe: str, case: Case) -> Plan:
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
    adapted = attached(whole_plan(recipe, case), case).eval()
    yield adapted


every_running = pytest.mark.parametrize(
    ("case", "running"), [(c, (r, c)) for r, c in FULLEST], ids=CASE_IDS, indirect=["running"], scope="module"
)


def first_gradients(adapted: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    adapted.zero_grad()
    loss_of(adapted, tokens).backward()
    return {name: p.grad for name, p in adapted.trained_parameters().items()}


def test_every_method_is_enrolled() -> None:
    assert {method for method, _, _ in SITES} == set(method_names())
    for name in method_names():
        method = get_method(name)
        assert (method.make_edit is None) == (method.kind == "module")
        assert method.summary and method.formula and method.source and method.overhead
        method.Options()  # every field has a default


@every_site
def test_starts_as_the_identity(site: Site) -> None:
    _, case, _ = site
    tokens = tiny_tokens(case, 2, 17)
    expected = logits_of(tiny_model(case), tokens)
    adapted = attached(site_plan(site), case, moved=False).eval()
    assert largest_difference(logits_of(adapted, tokens), expected) <= LOGITS_FP32
    with adapted.disable_adapter():
        off = logits_of(adapted, tokens)
    # At its start an adapter adds exactly zero: on and off are the same bits.
    assert torch.equal(logits_of(adapted, tokens), off)


@every_site
def test_counts_are_those_of_the_built_model(site: Site) -> None:
    method_name, case, role = site
    plan = site_plan(site)
    assert {s.path for s in plan.sites} == {c.path for c in tiny_inventory(case).components if c.role == role}
    adapted = attached(plan, case, moved=False)
    built = {name: p.numel() for name, p in adapted.trained_parameters().items()}
    assert sum(built.values()) == plan.trainable
    requiring = {id(p) for p in adapted.parameters() if p.requires_grad}
    assert requiring == {id(p) for p in adapted.trained_parameters().values()}
    method = get_method(method_name)
    for entry in plan.sites:
        assert entry.num_params == method.num_params(entry.shape, method.Options(**entry.options))
    for name in adapted.trained_parameters():
        assert adapted.optimizer_group(name) == method.optimizer_group


@every_site
def test_every_trained_tensor_learns(site: Site) -> None:
    """Finite, non-zero gradients; LoRA's A waits for the second step, since B starts at zero."""
    _, case, _ = site
    adapted = attached(site_plan(site), case, moved=False).train()
    tokens = tiny_tokens(case, 2, 17)
    for step in range(2):
        gradients = first_gradients(adapted, tokens)
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert bool(torch.isfinite(gradient).all()), name
            if step == 1 or "lora_A" not in name:
                assert bool(gradient.any()), name
        with torch.no_grad():
            for parameter in adapted.trained_parameters().values():
                parameter.sub_(0.1 * parameter.grad)


@every_site
def test_acts_on_the_output_and_merges(site: Site) -> None:
    method_name, case, _ = site
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(site_plan(site), case).eval()
    expected = logits_of(adapted, tokens)
    base = logits_of(tiny_model(case), tokens)
    assert largest_difference(expected, base) > 10 * LOGITS_MERGED, "the edit does not act, so nothing is compared"
    if not get_method(method_name).mergeable:
        with pytest.raises(AttachError):
            merge(adapted)
        return
    merged = merge(adapted)
    assert type(merged) is type(tiny_model(case))
    assert largest_difference(logits_of(merged, tokens), expected) <= LOGITS_MERGED


@every_running
def test_adapted_token_by_token_equals_full_sequence(case: Case, running: Any) -> None:
    tokens = tiny_tokens(case, 2, 15)
    expected = logits_of(running, tokens)
    cache, pieces = None, []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = running(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        first = running(input_ids=tokens[:, :6], use_cache=True)
        second = running(input_ids=tokens[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert largest_difference(torch.cat(pieces, dim=1), expected) <= LOGITS_FP32
    assert largest_difference(torch.cat([first.logits, second.logits], dim=1), expected) <= LOGITS_FP32


@every_running
def test_adapted_generates_the_greedy_tokens(case: Case, running: Any) -> None:
    prompt = tiny_tokens(case, 1, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = running.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    tokens = prompt
    for _ in range(6):
        logits = logits_of(running, tokens)[:, -1].clone()
        logits[:, tiny_config(case).eos_token_id] = -torch.inf  # what min_new_tokens does
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
        alone = logits_of(running, batch["input_ids"][:, start : start + length])
        assert largest_difference(packed[:, start : start + length], alone) <= LOGITS_FP32
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
    assert largest_difference(found, logits_of(running, document)) <= LOGITS_FP32


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
    stock = PeftModel.from_pretrained(tiny_model(case), tmp_path).eval()
    assert largest_difference(logits_of(stock, tokens), expected) <= LOGITS_FP32
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
    found = logits_of(merged, tokens)
    assert largest_difference(found, expected) <= LOGITS_MERGED
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(reloaded, tokens), found)


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
    assert largest_difference(logits_of(again, tokens), expected) <= LOGITS_FP32


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
    assert largest_difference(off, logits_of(tiny_model(case), tokens)) <= LOGITS_FP32
    assert torch.equal(logits_of(adapted, tokens), on)
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {
        id(p) for p in adapted.trained_parameters().values()
    }


@every_fullest
def test_checkpointing_gives_identical_gradients(recipe: str, case: Case) -> None:
    tokens = tiny_tokens(case, 2, 17)
    adapted = attached(whole_plan(recipe, case), case).train()
    expected = {name: g.clone() for name, g in first_gradients(adapted, tokens).items()}
    adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    first = next(m for m in adapted.get_base_model().model.layers[0].modules() if not list(m.children()))
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    found = first_gradients(adapted, tokens)
    assert len(calls) == 2, "the layer was not run again, so nothing was checkpointed"
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@every_fullest
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
            edit.trained().fill_(1e-4)
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
    assert {edit.trained().dtype for edit in adapted.edits.values()} == {torch.bfloat16}


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
