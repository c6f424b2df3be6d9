"""Every family, on every tiny config it offers, enrolled by the files found.

The model runs on ssmtune's operations with nothing trained; `test_methods.py` repeats what matters with adapters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contracts.tiny import (
    CASE_IDS,
    CASES,
    RECURRENT_CASES,
    RECURRENT_IDS,
    Case,
    assert_same_logits,
    cache_of,
    cached,
    logits_of,
    operation_names,
    tiny_config,
    tiny_inventory,
    tiny_model,
    tiny_tokens,
)
from tolerances import LOGITS_FP32, PLAIN_FORWARD, largest_difference

from ssmtune.errors import UnsupportedModel
from ssmtune.families.base import IGNORED_CONFIG, check_config, family_names, find_family, get_family
from ssmtune.inventory import take_inventory
from ssmtune.models import weightless
from ssmtune.operations import install_operations, recurrent_modules
from ssmtune.packing import PackedCollator
from ssmtune.probe import PATHS, probe

GATES = ("ssm.in.z", "ssm.in.z.bias", "gdn.in.z")
GATED_CASES = [case for case in CASES if any(s.role in GATES for s in tiny_inventory(case).segments)]
X_PROJ_CASES = [case for case in CASES if any(s.role == "ssm.x_proj.C" for s in tiny_inventory(case).segments)]
FUSED = {"mamba2_split_conv1d_scan_combined", "mamba_inner_fn"}
FUSED_CASES = [case for case in RECURRENT_CASES if FUSED & operation_names(case)]

ONE_VALUE = {
    ("nemotron_h", "attention_bias"): "no layer of transformers reads it",
    ("nemotron_h", "mamba_proj_bias"): "no layer of transformers reads it",
    ("zamba2", "use_conv_bias"): "the convolution of transformers has a bias whatever it says",
    ("lfm2", "use_expert_bias"): "of the router, a buffer that only ranks",
}
"""Switches of a bias that the tiny configs need not turn, with the reason."""
TWO_LAYERS = {"rwkv": "transformers divides by the number of layers less one when it initialises"}
"""Families that cannot have one layer of a kind, with the reason."""

every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
every_recurrent_case = pytest.mark.parametrize("case", RECURRENT_CASES, ids=RECURRENT_IDS)


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The case's model on ssmtune's operations."""
    model = tiny_model(request.param)
    installed = install_operations(model, get_family(request.param[0]))
    yield model
    installed.remove()


every_running = pytest.mark.parametrize(
    ("case", "running"), [(c, c) for c in CASES], ids=CASE_IDS, indirect=["running"], scope="module"
)


def test_every_family_is_found_by_its_model_types() -> None:
    for name in family_names():
        family = get_family(name)
        assert family.tiny_configs(), f"{name} offers no tiny config, so no contract covers it"
        for model_type in family.model_types:
            assert find_family(model_type) == (name, family)


@pytest.mark.parametrize("name", family_names())
def test_tiny_configs_show_what_the_architecture_can_be(name: str) -> None:
    """Every role but biases that no config grants, every switch of a bias on and off, odd heads, groups, an untied head."""
    family, cases = get_family(name), [case for case in CASES if case[0] == name]
    configs = [tiny_config(case).get_text_config() for case in cases]
    assert len(cases) >= 3
    roles = {component.role for case in cases for component in tiny_inventory(case).components}
    assert {claim.role for claim in family.claims if not claim.role.endswith(".bias")} <= roles

    def values(pattern: str) -> dict[str, set[Any]]:
        """Attributes of any of the configs that match, with their values over the configs."""
        keys = {key for config in configs for key in vars(config) if re.search(pattern, key)}
        return {key: {getattr(config, key, None) for config in configs} for key in sorted(keys)}

    for key, found in values("bias$").items():
        if key in family.handled_config and (name, key) not in ONE_VALUE:
            assert {True, False} <= found, (key, found)
    heads = values("(^|_)heads$")
    assert not heads or any(num & (num - 1) for found in heads.values() for num in found), heads
    for key, found in values("n_?groups?$").items():
        assert max(found) > 1, key
    assert False in values("tie_word_embeddings")["tie_word_embeddings"]
    kinds = [getattr(c, "layer_types", None) or ["only"] * c.num_hidden_layers for c in configs]
    assert name in TWO_LAYERS or any(layers.count(kind) == 1 for layers in kinds for kind in layers)


def test_unknown_family_and_model_type_name_the_nearest() -> None:
    with pytest.raises(UnsupportedModel, match="nearest: 'llama'"):
        get_family("lama")
    with pytest.raises(UnsupportedModel, match="'granitemoehybrids'.*nearest: 'granitemoehybrid'"):
        find_family("granitemoehybrids")


@every_case
def test_every_parameter_is_claimed_once(case: Case) -> None:
    model = tiny_model(case)
    inventory = take_inventory(model)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {c.path: c.shape for c in inventory.components} == parameters
    assert len(inventory.components) == len(parameters)
    assert inventory.total == sum(p.numel() for p in model.parameters())
    assert inventory.num_layers == model.config.get_text_config().num_hidden_layers
    assert {name for name, _ in model.named_parameters(remove_duplicate=False)} == set(parameters) | set(inventory.tied)
    assert set(inventory.tied.values()) <= set(parameters)


@every_case
def test_inventory_of_a_weightless_model_is_the_same(case: Case) -> None:
    assert take_inventory(weightless(tiny_config(case))) == take_inventory(tiny_model(case))


@every_case
def test_row_ranges_tile_their_tensor(case: Case) -> None:
    inventory = take_inventory(tiny_model(case))
    by_path: dict[str, list[Any]] = {}
    for segment in inventory.segments:
        by_path.setdefault(segment.path, []).append(segment)
    shapes = {c.path: c.shape for c in inventory.components}
    for path, segments in by_path.items():
        first = 0
        for start, end in sorted(part for segment in segments for part in segment.rows):
            assert start == first < end, path
            first = end
        assert first == shapes[path][0], path
        for segment in segments:
            assert segment.shape == (sum(end - start for start, end in segment.rows), *shapes[path][1:]), segment
        assert len({segment.role for segment in segments}) == len(segments)


@pytest.mark.parametrize("case", GATED_CASES, ids="-".join)
def test_row_ranges_feed_what_their_role_says(case: Case) -> None:
    """Rows of the gate z only scale the output: at zero they close the gate, and the layer returns its bias alone."""
    model = tiny_model(case)
    family = get_family(case[0])
    gates = [s for s in take_inventory(model).segments if s.role in GATES]
    outputs: dict[str, torch.Tensor] = {}
    modules = {name: module for name, module in model.named_modules() if module in recurrent_modules(model, family)}
    for gate in gates:
        with torch.no_grad():
            for first, end in gate.rows or ():
                model.get_parameter(gate.path)[first:end] = 0
    for name, module in modules.items():
        module.out_proj.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
    logits_of(model, tiny_tokens(case, 1, 9))
    assert outputs.keys() == modules.keys()
    for name, module in modules.items():
        bias = module.out_proj.bias
        expected = torch.zeros_like(outputs[name]) if bias is None else bias.expand_as(outputs[name])
        assert torch.equal(outputs[name], expected)


@pytest.mark.parametrize("case", X_PROJ_CASES, ids="-".join)
def test_rows_of_x_proj_feed_what_their_role_says(case: Case) -> None:
    """Without B nothing enters the state, without C nothing leaves it, without dt its projection has nothing to project."""
    inventory = tiny_inventory(case)
    tokens = tiny_tokens(case, 2, 9)

    def run(zeroed: str, moved: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = tiny_model(case)
        with torch.no_grad():
            for component in (*inventory.components, *inventory.segments):
                tensor = model.get_parameter(component.path)
                for first, end in component.rows or ((0, len(tensor)),):
                    tensor[first:end] *= component.role != zeroed
                    tensor[first:end] += component.role == moved
            output = model(input_ids=tokens, use_cache=True)
        layers = [layer for layer in cache_of(case, output).layers if hasattr(layer, "recurrent_states")]
        return output.logits, [layer.recurrent_states[0] for layer in layers]

    for part, moved in (("B", "ssm.A_log"), ("C", "ssm.A_log"), ("dt", "ssm.dt_proj")):
        logits, states = run(f"ssm.x_proj.{part}", "")
        assert all(bool(state.any()) == (part != "B") for state in states)
        assert torch.equal(run(f"ssm.x_proj.{part}", moved)[0], logits)
        assert not torch.equal(run("", moved)[0], run("", "")[0])


@every_case
def test_wrong_row_ranges_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family(case[0])
    rows = [claim for claim in family.claims if claim.rows is not None]
    if not rows:
        assert not take_inventory(tiny_model(case)).segments
        return

    # One row too many in the last part of every claim: the mistake that shifts nothing and still is one.
    def one_too_many(rows: Any) -> Any:
        return lambda config: (*rows(config)[:-1], (rows(config)[-1][0], rows(config)[-1][1] + 1))

    broken = tuple(dataclasses.replace(claim, rows=claim.rows and one_too_many(claim.rows)) for claim in family.claims)
    replaced = dataclasses.replace(family, claims=broken)
    monkeypatch.setattr("ssmtune.inventory.find_family", lambda model_type: (case[0], replaced))
    with pytest.raises(UnsupportedModel, match="row ranges of role .* cover"):
        take_inventory(tiny_model(case))


@every_case
def test_unclaimed_parameter_is_refused_and_named(case: Case) -> None:
    model = tiny_model(case)
    layer = next(c for c in tiny_inventory(case).components if c.layer == 0).path.partition(".0.")[0] + ".0"
    model.get_submodule(layer).register_parameter("novelty", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UnsupportedModel, match=rf"1 parameters have no role .*{re.escape(layer)}\.novelty"):
        take_inventory(model)


@every_case
def test_doubly_claimed_parameter_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family(case[0])
    doubled = dataclasses.replace(family, claims=(*family.claims, family.claims[0]))
    monkeypatch.setattr("ssmtune.inventory.find_family", lambda model_type: (case[0], doubled))
    with pytest.raises(UnsupportedModel, match=re.escape(family.claims[0].path)):
        take_inventory(tiny_model(case))


@every_case
def test_unhandled_config_attribute_is_refused_and_named(case: Case) -> None:
    name, family = case[0], get_family(case[0])
    config = tiny_config(case)
    check_config(name, family, config)
    config.invented_switch = 3
    with pytest.raises(UnsupportedModel, match=r"invented_switch=3 .*default: 'absent'.*families/"):
        check_config(name, family, config)


@every_case
def test_every_unhandled_default_is_refused_when_changed(case: Case) -> None:
    """No attribute of the installed transformers' config can move without a family saying what it does."""
    family = get_family(case[0])
    free = [
        key
        for key, value in type(tiny_config(case))().to_dict().items()
        if key not in family.handled_config and key not in IGNORED_CONFIG and not key.startswith("_")
    ]
    for key in free:
        config = tiny_config(case)
        vars(config)[key] = "changed"
        with pytest.raises(UnsupportedModel, match=f"config attribute {key}="):
            check_config(case[0], family, config)


@every_case
def test_every_weight_is_used_on_every_path(case: Case) -> None:
    model = tiny_model(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    uses = probe(model)
    assert tuple(uses.by_path) == PATHS
    for component in take_inventory(model).components:
        found = uses.of(component.path)
        if component.group == "other" and set(found.values()) == {"NONE"}:
            continue  # an image tower, which text does not pass through
        assert "NONE" not in found.values(), (component.path, found)
        if component.access == "module":
            assert set(found.values()) == {"CALL"}, (component.path, found)
        else:
            assert set(found.values()) == {"READ"}, (component.path, found)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("case", FUSED_CASES, ids="-".join)
def test_probe_sees_what_the_original_forward_would_skip(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a fused operation reads the output projection raw, and forgets the gated norm, or Mamba-1's x_proj."""
    family = get_family(case[0])

    def swallowing(module: torch.nn.Module, call: Any) -> Any:
        replaced = dict(family.operations(module, call))  # type: ignore[misc]

        def fused(projected: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            in_proj: Any = module.in_proj
            weight: Any = module.out_proj.weight  # type: ignore[union-attr]
            # Mamba-2 gives [B, T, C], Mamba-1 [B, C, T].
            projected = projected if projected.shape[-1] == in_proj.out_features else projected.transpose(1, 2)
            return torch.nn.functional.linear(projected[..., : weight.shape[1]], weight)

        return {**replaced, **dict.fromkeys(FUSED & set(replaced), fused)}

    broken = dataclasses.replace(family, operations=swallowing)
    monkeypatch.setattr("ssmtune.probe.find_family", lambda model_type: (case[0], broken))
    uses = probe(tiny_model(case))
    for component in take_inventory(tiny_model(case)).components:
        if component.role == "ssm.out":
            assert uses.of(component.path)["train"] == "READ"
            assert uses.of(component.path)["eval"] == "CALL"
        if component.role == "ssm.A_log":
            assert uses.of(component.path)["train"] == "READ"
        if component.role in ("ssm.norm", "ssm.x_proj"):
            assert uses.of(component.path)["train"] == "NONE"


@every_case
def test_operations_come_off_without_a_trace(case: Case) -> None:
    model, twin = tiny_model(case), tiny_model(case)
    installed = install_operations(model, get_family(case[0]))
    installed.remove()
    for module, other in zip(model.modules(), twin.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(module._forward_hooks) == len(other._forward_hooks)
    tokens = tiny_tokens(case, 2, 11)
    assert torch.equal(logits_of(model, tokens), logits_of(twin, tokens))


@every_running
def test_equals_the_untouched_model(case: Case, running: Any) -> None:
    tokens = tiny_tokens(case, 2, 37)
    limit = PLAIN_FORWARD.get(case[0], LOGITS_FP32)
    assert_same_logits(logits_of(running, tokens), logits_of(tiny_model(case), tokens), running, tokens, limit)


@every_running
def test_training_mode_equals_eval_mode(case: Case, running: Any) -> None:
    tokens = tiny_tokens(case, 2, 37)
    expected = logits_of(running, tokens)
    running.train()
    try:
        assert_same_logits(logits_of(running, tokens, use_cache=False), expected, running, tokens)
    finally:
        running.eval()


@every_running
def test_token_by_token_equals_full_sequence(case: Case, running: Any) -> None:
    tokens = tiny_tokens(case, 2, 23)
    expected = logits_of(running, tokens)
    cache, pieces = None, []
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            out = running(input_ids=tokens[:, t : t + 1], use_cache=True, **cached(case, cache))
            cache = cache_of(case, out)
            pieces.append(out.logits)
    assert_same_logits(torch.cat(pieces, dim=1), expected, running, tokens)


@pytest.mark.parametrize("cut", [2, 11, 20])
@every_running
def test_prefill_in_two_chunks_equals_full_sequence(case: Case, running: Any, cut: int) -> None:
    """Cuts before and after the convolution's reach and the model's own chunk size; then a single token on top."""
    tokens = tiny_tokens(case, 2, 23)
    expected = logits_of(running, tokens)
    with torch.no_grad():
        first = running(input_ids=tokens[:, :cut], use_cache=True)
        second = running(input_ids=tokens[:, cut:22], use_cache=True, **cached(case, cache_of(case, first)))
        third = running(input_ids=tokens[:, 22:], use_cache=True, **cached(case, cache_of(case, second)))
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert_same_logits(found, expected, running, tokens)


@every_running
def test_generate_takes_the_greedy_tokens_of_full_passes(case: Case, running: Any) -> None:
    prompt = tiny_tokens(case, 1, 7)
    found = running.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    tokens = prompt
    for _ in range(8):
        logits = logits_of(running, tokens)[:, -1].clone()
        logits[:, running.config.get_text_config().eos_token_id] = -torch.inf  # what min_new_tokens does
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)


@every_running
def test_packed_equals_separate_documents(case: Case, running: Any) -> None:
    """Documents of 1 to 19 tokens in one row beside a shorter row: each gets the logits that it gets alone."""
    lengths = [[5, 1, 19, 2, 7], [11, 9]]
    rows = []
    for index, row in enumerate(lengths):
        ids = tiny_tokens(case, sum(row), seed=index).tolist()
        rows.append({"input_ids": ids, "labels": ids, "seq_lengths": row})
    batch = PackedCollator(pad_token_id=0, multiple_of=8)(rows)
    packed = logits_of(running, batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for index, row in enumerate(lengths):
        start = 0
        for length in row:
            document = batch["input_ids"][index, start : start + length][None]
            alone = logits_of(running, document)[0]
            assert_same_logits(packed[index, start : start + length], alone, running, document)
            start += length


@every_running
def test_unpacked_row_would_leak(case: Case, running: Any) -> None:
    """The comparison above can fail: without position ids the second document sees the first."""
    tokens = tiny_tokens(case, 1, 14)
    joined = logits_of(running, tokens)[:, 7:]
    alone = logits_of(running, tokens[:, 7:])
    assert largest_difference(joined, alone) > 100 * LOGITS_FP32
    with pytest.raises(AssertionError):
        assert_same_logits(joined, alone, running, tokens)


@pytest.mark.parametrize("pad_token", [0, 42])
@pytest.mark.parametrize("side", ["left", "right"])
@every_running
def test_padding_changes_nothing(case: Case, running: Any, side: str, pad_token: int) -> None:
    lengths = (9, 14, 1)
    width = 14
    documents = [tiny_tokens(case, 1, n, seed=n) for n in lengths]
    ids = torch.full((len(lengths), width), pad_token)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    spans = []
    for index, document in enumerate(documents):
        n = document.shape[1]
        spans.append(slice(width - n, width) if side == "left" else slice(0, n))
        ids[index, spans[-1]], mask[index, spans[-1]] = document[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits_of(running, ids, attention_mask=mask, position_ids=positions)
    for index, document in enumerate(documents):
        assert_same_logits(found[index, spans[index]], logits_of(running, document)[0], running, document)


@every_running
def test_left_padding_leaves_generation_alone(case: Case, running: Any) -> None:
    prompts = [tiny_tokens(case, 1, n, seed=n) for n in (4, 9)]
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, 9 - prompt.shape[1] :], mask[index, 9 - prompt.shape[1] :] = prompt[0], 1
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = running.generate(ids, attention_mask=mask, **options)
    for index, prompt in enumerate(prompts):
        alone = running.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[index, 9:], alone[0, prompt.shape[1] :])


@every_running
def test_step_after_a_left_padded_prefill_equals_the_document_alone(case: Case, running: Any) -> None:
    """Greedy tokens hide small differences: here the logits of the step, after prompts shorter than a convolution too."""
    lengths, width = (1, 3, 9), 9
    ids = torch.full((len(lengths), width + 1), 42)
    mask = torch.zeros(len(lengths), width + 1, dtype=torch.long)
    documents = [tiny_tokens(case, 1, n + 1, seed=n) for n in lengths]
    for index, document in enumerate(documents):
        ids[index, -document.shape[1] :], mask[index, -document.shape[1] :] = document[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        prompt = running(
            input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
        )
        step = running(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            use_cache=True,
            **cached(case, cache_of(case, prompt)),
        )
    for index, document in enumerate(documents):
        expected = logits_of(running, document)[0, -1]
        assert_same_logits(step.logits[index, -1], expected, running, document)
