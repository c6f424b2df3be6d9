"""SDT: the published counts, which entries are chosen, and what an edit without a choice refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, logits_of, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from tolerances import LOGITS_FP32, largest_difference
from transformers import MambaConfig

from ssmtune import adapter_files, selection
from ssmtune.attach import attach, load
from ssmtune.base_tensors import base_tensor
from ssmtune.errors import AdapterMismatch, AttachError, ConfigError, PlacementError, TrainingFailed
from ssmtune.merge import merge
from ssmtune.methods._sdt_choice import Member, choose_entries
from ssmtune.methods.sdt import METHOD, SdtOptions
from ssmtune.models import weightless
from ssmtune.placement import named_recipe
from ssmtune.plan import Plan, make_plan
from ssmtune.recipe import Edit, Recipe
from ssmtune.records import file_sha256, write_json

MAMBA1: Case = ("mamba", "tied")


def sdt_plan(case: Case, **options: Any) -> Plan:
    recipe = Recipe(name="sdt only", edits=(Edit(method="sdt", select=("allowed",), options=options),))
    return make_plan(tiny_model(case), recipe)


@lru_cache
def published(name: str) -> Any:
    width, layers = {"130m": (768, 24), "1.4b": (2048, 48), "2.8b": (2560, 64)}[name]
    return weightless(MambaConfig(vocab_size=50280, hidden_size=width, num_hidden_layers=layers, state_size=16))


@pytest.mark.parametrize(
    ("name", "freeze", "entries"),
    [
        ("130m", 0.75, 12_960),
        ("130m", 0.9, 12_240),
        ("130m", 0.95, 11_880),
        ("1.4b", 0.75, 70_848),
        ("1.4b", 0.9, 66_912),
        ("1.4b", 0.95, 64_944),
        ("2.8b", 0.75, 117_504),
        ("2.8b", 0.9, 110_976),
        ("2.8b", 0.95, 107_712),
    ],
)
def test_counts_are_those_of_the_released_code(name: str, freeze: float, entries: int) -> None:
    companion = {"130m": 442_368, "1.4b": 2_359_296, "2.8b": 3_932_160}[name]
    recipe = named_recipe("sdt")
    sparse, output = recipe.edits
    recipe = replace(recipe, edits=(replace(sparse, options={**sparse.options, "state_freeze_ratio": freeze}), output))
    plan = make_plan(published(name), recipe)
    counts = {method: sum(s.num_params for s in plan.sites if s.method == method) for method in ("sdt", "lora")}
    assert counts == {"sdt": entries, "lora": companion}
    assert plan.trainable == entries + companion


def member(role: str, shape: tuple[int, ...], key: str = "", **options: Any) -> Member:
    part = {"ssm.A_log": "entries", "ssm.C": "entries", "ssm.x_proj.B": "columns", "ssm.in.dt": "rows"}[role]
    given = SdtOptions(**{"channel_freeze_ratio": 0.5, "state_freeze_ratio": 0.5, "part": part, **options})
    return Member(key=key or role, role=role, shape=shape, layer=0, options=given)


def test_the_rule_on_an_example_by_hand() -> None:
    """Channels by the sum of squares over states, then other states in other channels, then the columns of the former."""
    change = torch.tensor([[0.0, 3.0, -4.0, 0.1], [4.5, 0.0, 0.0, 0.0], [-1.0, -5.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    # Sums of squares: 25.01, 20.25, 30, 4. Kept: channels 0 and 2; their states 1, 2 and 1, 3.
    chosen = choose_entries(
        [member("ssm.A_log", (4, 4)), member("ssm.x_proj.B", (3, 4))], {"ssm.A_log": change, "ssm.x_proj.B": change}
    )
    assert chosen["ssm.A_log"].tolist() == [1, 2, 9, 11]
    assert chosen["ssm.x_proj.B"].tolist() == [0, 2, 4, 6, 8, 10]
    assert all(index.dtype == torch.int32 for index in chosen.values())


def test_readout_follows_a_and_rows_follow_their_head() -> None:
    change = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    members = [member("ssm.A_log", (2, 2)), member("ssm.C", (2, 2, 2))]
    chosen = choose_entries(members, {"ssm.A_log": change, "ssm.C": torch.zeros(2, 2, 2)})
    assert chosen["ssm.A_log"].tolist() == [2]
    assert chosen["ssm.C"].tolist() == [4, 5], "both numbers of the state that A keeps"
    members = [member("ssm.A_log", (2,)), member("ssm.in.dt", (4, 3))]
    chosen = choose_entries(members, {"ssm.A_log": torch.tensor([1.0, 2.0])})
    assert chosen["ssm.A_log"].tolist() == [1]
    assert chosen["ssm.in.dt"].tolist() == [6, 7, 8, 9, 10, 11], "two rows a head: those of head 1"


def chosen_channels(adapted: Any, layer: int) -> dict[str, set[int]]:
    found = {}
    for site in adapted.plan.sites:
        if site.layer == layer:
            entries = adapted.edits[site.key].index.long()
            width = site.shape[-1]
            found[site.role] = set((entries % width if "x_proj" in site.role else entries // width).tolist())
    return found


@pytest.mark.parametrize("rule", ["random", "magnitude"])
def test_one_set_of_channels_a_layer(rule: str) -> None:
    adapted = attach(tiny_model(MAMBA1), sdt_plan(MAMBA1, selection=rule, channel_freeze_ratio=0.9))
    by_layer = [chosen_channels(adapted, layer) for layer in (0, 1)]
    for channels in by_layer:
        assert set(channels) == {"ssm.A_log", "ssm.x_proj.B", "ssm.x_proj.C"}
        assert len({frozenset(c) for c in channels.values()}) == 1 and len(channels["ssm.A_log"]) == 6
    assert by_layer[0] != by_layer[1]


def test_random_choice_is_the_seed_s_and_magnitude_is_the_weights() -> None:
    def entries(**options: Any) -> list[torch.Tensor]:
        adapted = attach(tiny_model(MAMBA1), sdt_plan(MAMBA1, **options))
        return [edit.index for edit in selection.sparse_edits(adapted.edits).values()]

    first, again, other = (torch.cat(entries(selection="random", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    weight = tiny_model(MAMBA1).get_parameter("backbone.layers.0.mixer.A_log").exp()
    channel = int(weight.square().sum(1).argmax())
    states = sorted(weight[channel].topk(2).indices.tolist())
    assert entries(selection="magnitude")[0].tolist() == [channel * 8 + state for state in states]


@pytest.mark.parametrize(
    "case", [MAMBA1, ("qwen3_next", "odd"), ("granite_hybrid", "odd"), ("s4d", "odd")], ids="-".join
)
def test_the_edit_adds_to_the_chosen_entries_and_to_no_other(case: Case) -> None:
    """W[index] += delta in fp32, on the absolute rows of the site, and merged the same."""
    adapted = attach(tiny_model(case), sdt_plan(case, selection="random", channel_freeze_ratio=0.5))
    base = adapted.base_model.model
    expected = {}
    for number, site in enumerate(adapted.plan.sites):
        edit: Any = adapted.edits[site.key]
        with torch.no_grad():
            edit.delta.copy_(1 + torch.arange(len(edit.delta)) + 100 * number)
        weight = expected.setdefault(site.path, base_tensor(base, site.path).detach().clone().flatten())
        width = math.prod(site.shape[1:])
        rows = [row for first, end in site.rows or ((0, site.shape[0]),) for row in range(first, end)]
        for entry, delta in zip(edit.index.tolist(), edit.delta.tolist(), strict=True):
            weight[rows[entry // width] * width + entry % width] += delta
    merged = merge(adapted)
    for path, weight in expected.items():
        assert torch.equal(merged.get_parameter(path).flatten(), weight), path


def test_a_warm_up_that_has_not_run_is_refused_in_use_and_counted_in_the_plan() -> None:
    adapted = attach(tiny_model(MAMBA1), make_plan(tiny_model(MAMBA1), "sdt"))
    assert sum(p.numel() for p in adapted.trained_parameters().values()) == adapted.plan.trainable
    with pytest.raises(AttachError, match="before its entries are chosen.*'ssmtune train'.*'random' or 'magnitude'"):
        logits_of(adapted, tiny_tokens(MAMBA1, 1, 5))
    with adapted.disable_adapter():
        off = logits_of(adapted, tiny_tokens(MAMBA1, 1, 5))
    assert largest_difference(off, logits_of(tiny_model(MAMBA1), tiny_tokens(MAMBA1, 1, 5))) <= LOGITS_FP32


def test_warm_up_trains_all_of_a_and_ranks_by_its_change() -> None:
    adapted = attach(tiny_model(MAMBA1), sdt_plan(MAMBA1, selection="warmup", warmup_steps=7))
    assert selection.num_warmup_steps(adapted.plan, adapted.edits) == 7
    selection.begin_warm_up(adapted.plan, adapted.edits)
    trained = adapted.edit_parameters()
    assert {name.rpartition(".")[2] for name in trained} == {"A_log"}, "B and C wait for the choice"
    assert all(p.shape == (64, 8) for p in trained.values())
    with pytest.raises(TrainingFailed, match="layers.0.mixer.A_log: the warm-up did not move it"):
        selection.choose_after_warm_up(adapted.plan, adapted.edits)
    with torch.no_grad():
        for number, parameter in enumerate(trained.values()):
            parameter[5 + number, 3] = -1.0
            parameter[5 + number, 6] = 0.5
    chosen = selection.choose_after_warm_up(adapted.plan, adapted.edits)
    selection.put(adapted.edits, chosen)
    assert chosen["backbone.layers.0.mixer.A_log"].tolist() == [5 * 8 + 3, 5 * 8 + 6]
    assert chosen_channels(adapted, 1) == dict.fromkeys(("ssm.A_log", "ssm.x_proj.B", "ssm.x_proj.C"), {6})
    # The warm-up's deltas are gone: what trains now starts from zero.
    assert not any(bool(p.any()) for p in adapted.edit_parameters().values())


def test_saved_as_sorted_int32_and_refused_when_altered(tmp_path: Path) -> None:
    plan = sdt_plan(MAMBA1, selection="random", seed=3)
    adapted = attach(tiny_model(MAMBA1), plan)
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / adapter_files.OUR_TENSORS)
    key = "backbone.layers.0.mixer.A_log"
    assert tensors[f"{key}.index"].dtype == torch.int32 and tensors[f"{key}.delta"].dtype == torch.float32
    assert tensors[f"{key}.index"].shape == tensors[f"{key}.delta"].shape == (2,)
    again = load(tiny_model(MAMBA1), tmp_path)
    assert torch.equal(again.edits[key].index, adapted.edits[key].index)  # type: ignore[attr-defined]
    for bad in (tensors[f"{key}.index"].flip(0), tensors[f"{key}.index"] + 512, tensors[f"{key}.index"].long()):
        save_file({**tensors, f"{key}.index": bad.contiguous()}, tmp_path / adapter_files.OUR_TENSORS)
        facts = adapter_files.json.loads((tmp_path / adapter_files.OUR_CONFIG).read_text())
        facts["sha256"][adapter_files.OUR_TENSORS] = file_sha256(tmp_path / adapter_files.OUR_TENSORS)
        write_json(tmp_path / adapter_files.OUR_CONFIG, facts)
        with pytest.raises(AdapterMismatch, match=r"A_log.index is (not sorted|torch.int64)"):
            load(tiny_model(MAMBA1), tmp_path)


@pytest.mark.parametrize("case", [("llama", "dense"), ("rwkv", "dense"), ("lfm2", "dense")], ids="-".join)
def test_models_without_such_a_recurrence_are_refused(case: Case) -> None:
    with pytest.raises(PlacementError, match="method 'sdt' has nothing to edit in this"):
        make_plan(tiny_model(case), "sdt")


@pytest.mark.parametrize("ratio", ["channel_freeze_ratio", "state_freeze_ratio"])
def test_ratios_that_keep_nothing_are_refused(ratio: str) -> None:
    with pytest.raises(ConfigError, match=f"{ratio}: got 1.0, which freezes everything"):
        sdt_plan(MAMBA1, **{ratio: 1.0})
    assert METHOD.num_params((8,), SdtOptions(part="entries", channel_freeze_ratio=0.99)) == 1


def test_warm_up_without_a_is_refused() -> None:
    edits = (Edit(method="sdt", select=("ssm.x_proj.B",), options={"selection": "warmup"}),)
    plan = make_plan(tiny_model(MAMBA1), Recipe(name="columns", edits=edits))
    adapted = attach(tiny_model(MAMBA1), plan)
    with pytest.raises(PlacementError, match="no tensor of A is in the plan.*ssm.x_proj.B.*Add 'ssm.A_log'"):
        selection.num_warmup_steps(adapted.plan, adapted.edits)
