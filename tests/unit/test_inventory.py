"""What an inventory counts, prints and keeps apart; the claims themselves are tested for every family in contracts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from contracts.tiny import tiny_model
from transformers import AutoModelForCausalLM, GPT2Config

from ssmtune.errors import UnsupportedModel
from ssmtune.inventory import coverage_table, take_inventory

DENSE = ("granite_hybrid", "dense")


def test_components_of_a_tiny_hybrid_by_hand() -> None:
    inventory = take_inventory(tiny_model(DENSE))
    by_role: dict[str, list[Any]] = {}
    for component in inventory.components:
        by_role.setdefault(component.role, []).append(component)
    # Hidden 32, expanded to 64; 8 heads of 8; 1 group of 16 states: in_proj gives z 64, x 64, B 16, C 16, dt 8.
    assert {c.shape for c in by_role["ssm.in"]} == {(168, 32)}
    assert {c.shape for c in by_role["ssm.out"]} == {(32, 64)}
    assert {c.shape for c in by_role["ssm.conv"]} == {(96, 1, 4)}
    assert {c.layer for c in by_role["ssm.in"]} == {0, 2} and {c.layer for c in by_role["attn.q"]} == {1}
    assert inventory.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (inventory.family, inventory.topology, inventory.num_layers) == ("granite_hybrid", "sequential", 3)
    rows = {s.role: s.rows for s in inventory.segments if s.layer == 0 and s.path.endswith("in_proj.weight")}
    assert rows == {
        "ssm.in.z": ((0, 64),),
        "ssm.in.x": ((64, 128),),
        "ssm.in.B": ((128, 144),),
        "ssm.in.C": ((144, 160),),
        "ssm.in.dt": ((160, 168),),
    }


def test_tied_tensor_is_counted_once() -> None:
    model = tiny_model(DENSE)
    names = [c.path for c in take_inventory(model).components]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1


def test_broken_tie_is_seen() -> None:
    """A model whose head was untied by accident has another inventory, so a plan for the tied one is refused."""
    model = tiny_model(DENSE)
    whole = take_inventory(model).digest
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert take_inventory(model).digest != whole


def test_digest_follows_shapes_but_not_values() -> None:
    model = tiny_model(DENSE)
    digest = take_inventory(model).digest
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert take_inventory(model).digest == digest
    assert take_inventory(tiny_model(("granite_hybrid", "odd"))).digest != digest


def test_printed_form_is_the_contract_and_json() -> None:
    printed = take_inventory(tiny_model(DENSE)).to_dict()
    assert {"family", "topology", "total", "unclaimed", "components"} <= set(printed)
    assert printed["unclaimed"] == []
    assert json.loads(json.dumps(printed))["total"] == printed["total"]
    whole = [c for c in printed["components"] if c["rows"] is None]
    assert sum(torch.Size(c["shape"]).numel() for c in whole) == printed["total"]


def test_unknown_architecture_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8))
    with pytest.raises(UnsupportedModel, match="model_type 'gpt2' is not supported"):
        take_inventory(model)


def test_coverage_counts_what_is_edited() -> None:
    inventory = take_inventory(tiny_model(DENSE))
    edited = {c.path for c in inventory.components if c.role in ("attn.q", "attn.v", "ssm.in")}
    table = {(row["layer"], row["group"]): (row["adapted"], row["sites"]) for row in coverage_table(inventory, edited)}
    assert table[1, "attention"] == (2, 4)
    assert table[0, "recurrent"] == table[2, "recurrent"] == (1, 2)
    assert table[0, "core"] == (0, 3)
    assert (1, "recurrent") not in table
    everything = coverage_table(inventory, {c.path for c in inventory.components})
    assert all(row["adapted"] == row["sites"] for row in everything)
