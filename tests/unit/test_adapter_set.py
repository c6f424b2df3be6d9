"""Several adapters on one base: each is what loading it alone gives, whatever was in use before, and caches do not mix."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from contracts.tiny import CASES, cache_of, cached, logits_of, move, randomise, tiny_model, tiny_tokens

from ssmtune.adapter_set import AdapterSet
from ssmtune.attach import AdaptedModel, attach, load
from ssmtune.errors import AdapterMismatch, AttachError, ConfigError, PlacementError
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

DENSE = ("granite_hybrid", "dense")
RECIPES = {
    "lora": "all",
    "core": "core",
    "sdt": "control:sdt-magnitude",
    "dora": "dora",
    "state": "initial-state",
    "branch": "hankel",
    "prompt": "prompt",
    "affix": "affix",
}
"""One adapter of every kind of container."""


def save(directory: Path, recipe: str | Recipe, *, seed: int = 1) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_model(DENSE)
        adapted = attach(model, make_plan(model, recipe))
    randomise(adapted, seed=seed)
    adapted.save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        save(root / name, recipe, seed=seed)
    return root


@pytest.fixture
def adapters(saved: Path) -> AdapterSet:
    adapters = AdapterSet(tiny_model(DENSE))
    for name in RECIPES:
        adapters.add(name, saved / name)
    return adapters


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str | None, torch.Tensor]:
    """The logits of each adapter on a model of its own, and of the base."""
    ids = tiny_tokens(DENSE, 2, 9)
    alone = {name: logits_of(load(tiny_model(DENSE), saved / name), ids) for name in RECIPES}
    return {None: logits_of(tiny_model(DENSE), ids), **alone}


def test_every_swap_gives_what_loading_alone_gives(
    adapters: AdapterSet, expected: dict[str | None, torch.Tensor]
) -> None:
    ids = tiny_tokens(DENSE, 2, 9)
    assert len({float(logits.sum()) for logits in expected.values()}) == len(expected)
    order = [*RECIPES, None, *reversed(RECIPES), None, "sdt", "lora", "branch", None]
    for name in order:
        adapters.use(name)
        assert adapters.in_use == name and adapters.names == tuple(RECIPES)
        assert torch.equal(logits_of(adapters.model, ids), expected[name]), name
    untouched = tiny_model(DENSE).state_dict()
    released = adapters.release().state_dict()
    assert list(released) == list(untouched) and all(torch.equal(released[n], t) for n, t in untouched.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in adapters.model.modules())
    with pytest.raises(AttachError, match="was released before"):
        adapters.use("lora")


def test_a_swap_that_leaves_something_on_is_seen(
    adapters: AdapterSet, expected: dict[str | None, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: what a swap takes off stays on in part, so that the comparison above is worth something."""
    adapters.use("branch")
    on = adapters._on
    assert on is not None and on._branches is not None
    monkeypatch.setattr(on._branches, "remove", lambda: None)
    adapters.use("core")
    with pytest.raises((AssertionError, AttachError)):
        assert torch.equal(logits_of(adapters.model, tiny_tokens(DENSE, 2, 9)), expected["core"])


PARTS = {
    "projections": Edit(method="lora", select=("attn.q", "mlp")),
    "core": Edit(method="core", select=("core",)),
    "states": Edit(method="initial_state", select=("state.initial_state",)),
    "branch": Edit(method="hankel", select=("block.mlp",)),
}


def all_parts(root: Path) -> AdaptedModel:
    """One adapter with the values of an adapter for each of `PARTS`, which are written to `root`."""
    for seed, (name, edit) in enumerate(PARTS.items()):
        save(root / name, Recipe(name=name, edits=(edit,)), seed=seed)
    model = tiny_model(DENSE)
    together = attach(model, make_plan(model, Recipe(name="all", edits=tuple(PARTS.values()))))
    for name in PARTS:
        part = load(tiny_model(DENSE), root / name)
        with torch.no_grad():
            for key, value in part.trained_parameters().items():
                together.trained_parameters()[key].copy_(value)
    return together.eval()


def test_a_composition_is_one_adapter_with_all_the_edits(tmp_path: Path) -> None:
    together, ids = all_parts(tmp_path), tiny_tokens(DENSE, 2, 9)
    adapters = AdapterSet(tiny_model(DENSE))
    for name in PARTS:
        adapters.add(name, tmp_path / name)
    adapters.use("core")
    name = adapters.compose(["states", "core", "branch", "projections"])
    assert name == "states+core+branch+projections" and adapters.in_use == "core"
    adapters.use(name)
    assert torch.equal(logits_of(adapters.model, ids), logits_of(together, ids))
    # Planted: one value off in one of the parts.
    move({"": next(iter(together.edit_parameters().values()))})
    assert not torch.equal(logits_of(adapters.model, ids), logits_of(together, ids))


def test_rows_of_one_tensor_compose_and_common_rows_do_not(tmp_path: Path, adapters: AdapterSet) -> None:
    for role in ("ssm.in.x", "ssm.in.dt"):
        save(tmp_path / role, Recipe(name=role, edits=(Edit(method="lora", select=(role,), options={"rank": 2}),)))
        adapters.add(role, tmp_path / role)
    adapters.compose(["ssm.in.x", "ssm.in.dt"], "rows")
    assert adapters.names[-1] == "rows"
    with pytest.raises(PlacementError, match=r"^model\.layers\.0\.mamba\.in_proj\.weight: edited by adapter 'rows'"):
        adapters.compose(["rows", "lora"])
    with pytest.raises(PlacementError, match=r"A_log: edited by adapter 'core' .* and by 'sdt'"):
        adapters.compose(["core", "sdt"])
    with pytest.raises(ConfigError, match="two or more different"):
        adapters.compose(["core", "core"])
    with pytest.raises(ConfigError, match="nearest: 'core'"):
        adapters.compose(["lora", "cor"])


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("granite_hybrid", "initial-state"), ("mamba", "affix"), ("rwkv", "core"), ("xlstm", "initial-state")],
)
def test_a_cache_is_continued_under_the_adapter_that_filled_it(family: str, recipe: str, tmp_path: Path) -> None:
    """Whatever kind of object the family's cache is, and in a copy of it as well."""
    case = next(case for case in CASES if case[0] == family)
    model, ids = tiny_model(case), tiny_tokens(case, 1, 7)
    adapted = attach(model, make_plan(model, recipe))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "a")
    stray = cache_of(case, adapted.detach()(input_ids=ids, use_cache=True))
    adapters = AdapterSet(model)
    adapters.add("a", tmp_path / "a")
    adapters.use("a")
    whole = logits_of(model, ids)
    cache = cache_of(case, model(input_ids=ids[:, :5], use_cache=True))
    kept = copy.deepcopy(cache)
    rest = [logits_of(model, ids[:, [t]], use_cache=True, **cached(case, cache)) for t in (5, 6)]
    torch.testing.assert_close(torch.cat(rest, dim=1), whole[:, 5:], atol=1e-4, rtol=1e-4)
    with pytest.raises(
        AttachError, match=r"outside of this set of adapters, and adapter 'a' is|got a cache_params of class xLSTMCache"
    ):
        logits_of(model, ids, use_cache=True, **cached(case, stray))
    adapters.use(None)
    for held in (cache, kept):
        with pytest.raises(AttachError, match=r"filled under adapter 'a', and the base alone is in use"):
            logits_of(model, ids[:, -1:], use_cache=True, **cached(case, held))
    adapters.use("a")
    again = logits_of(model, ids[:, [5]], use_cache=True, **cached(case, kept))
    assert torch.equal(again, rest[0])


def test_generation_swaps(adapters: AdapterSet, saved: Path) -> None:
    prompt = tiny_tokens(DENSE, 1, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for name in ("prompt", "branch", "state", "prompt"):
        adapters.use(name)
        expected = load(tiny_model(DENSE), saved / name).generate(input_ids=prompt, **options)
        assert torch.equal(adapters.model.generate(input_ids=prompt, **options), expected), name


def test_what_cannot_be_added(adapters: AdapterSet, saved: Path, tmp_path: Path) -> None:
    """Whatever fails, what was in use is in use afterwards."""
    adapters.use("state")
    with pytest.raises(ConfigError, match="there is one of this name"):
        adapters.add("core", saved / "core")
    with pytest.raises(ConfigError, match="nearest: 'state'"):
        adapters.use("stat")
    other = tiny_model(DENSE)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    adapted = attach(other, make_plan(other, "core"))
    adapted.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatch, match="the model given has digest"):
        adapters.add("other", tmp_path / "other")
    with pytest.raises(AttachError, match="carries adapters"):
        AdapterSet(other)
    assert adapters.in_use == "state" and "other" not in adapters.names
    found = logits_of(adapters.model, tiny_tokens(DENSE, 1, 9))
    assert torch.equal(found, logits_of(load(tiny_model(DENSE), saved / "state"), tiny_tokens(DENSE, 1, 9)))
