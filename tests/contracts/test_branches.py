"""Branches beside the blocks of every family: where they are, what they see, and what a cache keeps of them."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.test_methods import BRANCHED, attached, open_gates, whole_plan
from contracts.tiny import (
    CASE_IDS,
    CASES,
    Case,
    cache_of,
    cached,
    logits_of,
    tiny_inventory,
    tiny_model,
    tiny_tokens,
)
from tolerances import LOGITS_FP32, largest_difference

from ssmtune.attach import attach, load
from ssmtune.branches import STATES
from ssmtune.errors import AttachError, ConfigError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.packing import PackedCollator
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

every_branched = pytest.mark.parametrize("case", [case for _, case in BRANCHED], ids=["-".join(c) for _, c in BRANCHED])
SOME = tuple(
    case for case in CASES if case in {("llama", "dense"), ("granite_hybrid", "moe"), ("zamba2", "two-blocks")}
)
PLAIN: Case = ("llama", "dense")
every_some = pytest.mark.parametrize("case", SOME, ids="-".join)


def branched(case: Case, **options: Any) -> Any:
    adapted = attached(whole_plan("branches", case), case, **options)
    open_gates(adapted)
    return adapted


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_every_layer_with_an_mlp_or_attention_has_its_block(case: Case) -> None:
    """A family whose layers need another rule says so in `blocks`; no branch hangs on a whole layer."""
    inventory, family = tiny_inventory(case), get_family(case[0])
    for group in ("mlp", "attention"):
        role = f"block.{group}"
        blocks = [block for block in inventory.blocks if block.role == role]
        assert not any(re.search(r"\.\d+\.branch$", block.path) for block in blocks), "beside a whole layer"
        if role not in family.blocks:
            expected = {c.layer for c in inventory.components if c.group == group and c.layer is not None}
            assert {block.layer for block in blocks} == expected
    assert len({block.path for block in inventory.blocks}) == len(inventory.blocks)


def packed_batch(case: Case, lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    ids = tiny_tokens(case, sum(lengths), seed=seed).tolist()
    return PackedCollator(pad_token_id=0)([{"input_ids": ids, "labels": ids, "seq_lengths": lengths}])


@every_branched
def test_two_passes_before_the_backward_recompute_what_they_computed(case: Case) -> None:
    """As preference losses make them: other documents in each pass, with gradient checkpointing."""
    batches = [packed_batch(case, [5, 9], 0), packed_batch(case, [8, 2, 4], 1)]
    adapted = branched(case).train()
    gradients = []
    for recompute in (False, True):
        if recompute:
            adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        adapted.zero_grad()
        for batch in batches:
            batch["logits"] = adapted(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        with torch.no_grad():
            # A third one between them and the backward, on one document.
            adapted(input_ids=batches[0]["input_ids"], use_cache=False)
        sum(batch["logits"].square().mean() for batch in batches).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad.clone() for name, p in adapted.trained_parameters().items()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


FROM_CHECKPOINTING = {
    "_gradient_checkpointing_func",
    "gradient_checkpointing",
    "_require_grads_hooks",
    "_require_grads_hook",
}
"""What transformers itself leaves on a model that has been recomputed."""


def traces(model: Any) -> list[Any]:
    """What hangs on each module, without what transformers leaves of its checkpointing."""
    return [
        (
            name,
            type(m),
            set(vars(m)) - FROM_CHECKPOINTING,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
        if "embed" not in name
    ]


@every_some
def test_saved_loaded_and_detached(case: Case, tmp_path: Path) -> None:
    tokens = tiny_tokens(case, 2, 17)
    model = tiny_model(case)
    before = traces(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = attach(model, whole_plan("branches", case))
    adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    open_gates(adapted)
    adapted.train()(input_ids=tokens, use_cache=False).logits.sum().backward()
    adapted.get_base_model().activation_checkpointing_disable()
    expected = logits_of(adapted.eval(), tokens)
    adapted.save_pretrained(tmp_path)
    loaded = load(tiny_model(case), tmp_path)
    assert torch.equal(logits_of(loaded, tokens), expected)
    assert loaded.plan == adapted.plan
    base = adapted.detach()
    for found, expected in zip(traces(base), before, strict=True):
        assert found == expected, found[2] ^ expected[2]
    assert not any(type(vars(m).get("_gradient_checkpointing_func")).__name__ == "_Carried" for m in base.modules())
    assert dict.fromkeys(weights, True) == {
        name: torch.equal(value, weights[name]) for name, value in base.state_dict().items()
    }
    assert torch.equal(logits_of(base, tokens), logits_of(tiny_model(case), tokens))


@every_some
def test_bf16_base_and_autocast_keep_the_branch_in_fp32(case: Case) -> None:
    adapted = branched(case, dtype=torch.bfloat16).train()
    with torch.autocast("cpu", torch.bfloat16):
        adapted(input_ids=tiny_tokens(case, 2, 17), use_cache=False).logits.float().square().mean().backward()
    for name, parameter in adapted.edit_parameters().items():
        assert parameter.dtype == torch.float32 and parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name


def step_after(adapted: Any, case: Case, prompt: torch.Tensor, change: Any, step: torch.Tensor) -> torch.Tensor:
    """Logits of `step` after `prompt`, with `change` applied to the cache between them."""
    with torch.no_grad():
        cache = cache_of(case, adapted(input_ids=prompt, use_cache=True))
        cache = change(cache) or cache
        logits: torch.Tensor = adapted(input_ids=step, use_cache=True, **cached(case, cache)).logits
    return logits


@every_some
def test_a_cache_keeps_the_states_and_permutes_them_with_its_rows(case: Case) -> None:
    adapted = branched(case).eval()
    prompt, step = tiny_tokens(case, 2, 9), tiny_tokens(case, 2, 1, seed=4)
    expected = logits_of(adapted, torch.cat([prompt, step], 1))[:, -1:]
    assert largest_difference(step_after(adapted, case, prompt, lambda cache: None, step), expected) <= LOGITS_FP32
    swapped = step_after(adapted, case, prompt, lambda cache: cache.reorder_cache(torch.tensor([1, 0])), step.flip(0))
    assert largest_difference(swapped, expected.flip(0)) <= LOGITS_FP32

    def copied(cache: Any) -> Any:
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        assert getattr(twin, STATES) is not getattr(cache, STATES)
        return twin

    assert largest_difference(step_after(adapted, case, prompt, copied, step.flip(0)), expected.flip(0)) <= LOGITS_FP32
    # Planted fault: states that stay behind when the rows move.
    stale = step_after(
        adapted, case, prompt, lambda cache: type(cache).reorder_cache(cache, torch.tensor([1, 0])), step.flip(0)
    )
    assert largest_difference(stale, expected.flip(0)) > 10 * LOGITS_FP32


def drop_states(cache: Any) -> None:
    states = getattr(cache, STATES).states
    states.update({key: torch.zeros_like(state) for key, state in states.items()})


@every_some
def test_a_decode_without_its_state_differs(case: Case) -> None:
    """Planted fault: the published code drops the recurrence when it generates."""
    adapted = branched(case).eval()
    prompt, step = tiny_tokens(case, 2, 9), tiny_tokens(case, 2, 1, seed=4)
    expected = logits_of(adapted, torch.cat([prompt, step], 1))[:, -1:]
    dropped = step_after(adapted, case, prompt, drop_states, step)
    assert largest_difference(dropped, expected) > 10 * LOGITS_FP32


def test_a_cache_that_the_branches_have_not_seen_is_refused() -> None:
    case = PLAIN
    adapted = branched(case).eval()
    prompt, step = tiny_tokens(case, 1, 6), tiny_tokens(case, 1, 1)
    with adapted.disable_adapter(), torch.no_grad():
        plain = cache_of(case, adapted(input_ids=prompt, use_cache=True))
    with (
        pytest.raises(
            AttachError, match=r"holds 6 tokens, of which the branch beside model\.layers\.0\.self_attn has seen 0"
        ),
        torch.no_grad(),
    ):
        adapted(input_ids=step, **cached(case, plain))
    with adapted.disable_adapter(), torch.no_grad():
        adapted(input_ids=step, **cached(case, plain))
    with pytest.raises(AttachError, match="holds 4 tokens, of which .* has seen 6"):
        step_after(adapted, case, prompt, lambda cache: cache.crop(-2), step)
    # A pass that failed leaves nothing behind.
    assert largest_difference(logits_of(adapted, prompt), logits_of(adapted, prompt)) == 0


def test_a_cache_goes_when_the_generation_is_over() -> None:
    case = PLAIN
    adapted = branched(case).eval()
    gc.disable()
    try:
        with torch.no_grad():
            output = adapted(input_ids=tiny_tokens(case, 1, 6), use_cache=True)
        kept = weakref.ref(cache_of(case, output))
        del output
        assert kept() is None
    finally:
        gc.enable()


def test_a_block_called_by_itself_is_refused() -> None:
    case = PLAIN
    adapted = branched(case)
    block = adapted.get_base_model().model.layers[0].mlp
    with pytest.raises(AttachError, match=r"model\.layers\.0\.mlp was called outside its model's own call"):
        block(torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_output": True}, "gate and C both start at zero"),
        ({"complex_modes": True, "order": 5}, "order 5 is odd"),
    ],
)
def test_a_branch_that_could_not_work_is_refused(options: dict[str, Any], message: str) -> None:
    recipe = Recipe(name="dead", edits=(Edit(method="hankel", select=("block.mlp",), options=options),))
    with pytest.raises(ConfigError, match=message):
        make_plan(tiny_model(PLAIN), recipe)


def test_a_zero_output_with_an_open_gate_learns() -> None:
    case = PLAIN
    options = {"zero_output": True, "init_gate": 0.1, "gate": "channel", "order": 4}
    plan = make_plan(
        tiny_model(case),
        Recipe(name="lora-like", edits=(Edit(method="hankel", select=("block.mlp",), options=options),)),
    )
    adapted = attached(plan, case, moved=False)
    tokens = tiny_tokens(case, 2, 9)
    assert torch.equal(logits_of(adapted.eval(), tokens), logits_of(tiny_model(case), tokens))
    adapted.train()(input_ids=tokens, use_cache=False).logits.square().mean().backward()
    moved = {name for name, p in adapted.edit_parameters().items() if p.grad.any()}
    assert moved == {name for name in adapted.edit_parameters() if name.endswith(".C")}
    assert plan.sites[0].num_params == 2 * 4 * 32 + 2 * 4 + 32


def test_a_model_without_blocks_has_no_hankel_site() -> None:
    with pytest.raises(PlacementError, match=r"block\.mlp"):
        make_plan(tiny_model(("mamba2", "tied")), "hankel")
