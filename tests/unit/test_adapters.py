"""`ssmtune adapters` and `ssmtune diff`: what directories hold, and where two adapters differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from contracts.tiny import randomise, tiny_model
from safetensors.torch import load_file, save_file
from unit.test_cli import Run, run

from ssmtune.adapter_files import OUR_CONFIG, OUR_TENSORS, PEFT_TENSORS
from ssmtune.adapters import diff_adapters, list_adapters
from ssmtune.attach import attach
from ssmtune.errors import ConfigError
from ssmtune.plan import make_plan
from ssmtune.records import file_sha256

DENSE = ("granite_hybrid", "dense")
__all__ = ["run"]


def save(directory: Path, recipe: str = "all+core", *, seed: int = 1, rank: int = 2, nudge: float = 0.0) -> Path:
    torch.manual_seed(0)
    model = tiny_model(DENSE)
    adapted = attach(model, make_plan(model, recipe, rank=rank))
    randomise(adapted, seed=seed)
    if nudge:
        with torch.no_grad():
            adapted.trained_parameters()["model.layers.2.mamba.D"][1] += nudge
    adapted.save_pretrained(directory, step=seed, run_id="run")
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one has two adapters."""
    root = tmp_path_factory.mktemp("saved")
    save(root / "one" / "adapter")
    (root / "one" / "run.json").write_text("{}")
    save(root / "one" / "checkpoints" / "checkpoint-1", seed=2)
    save(root / "two", "core")
    return root


def test_the_same_adapter_is_the_same(saved: Path, tmp_path: Path, run: Run) -> None:
    """Also where run and step differ: those are facts about the saving."""
    result = diff_adapters(str(saved / "one"), str(save(tmp_path / "again")))
    assert result["identical"] and not result["facts"]
    facts = json.loads((tmp_path / "again" / OUR_CONFIG).read_text())
    (tmp_path / "again" / OUR_CONFIG).write_text(json.dumps({**facts, "step": 7}))
    result = diff_adapters(str(saved / "one"), str(tmp_path / "again"))
    assert result["identical"] and result["facts"] == {"step": [1, 7]}
    code, out, err = run("diff", str(saved / "one"), str(tmp_path / "again"))
    assert code == 0 and out == "" and "are the same adapter" in err


def test_one_element_that_moved_is_found(saved: Path, tmp_path: Path, run: Run) -> None:
    other = save(tmp_path / "nudged", nudge=0.25)
    result = diff_adapters(str(saved / "one"), str(other))
    assert not result["identical"] and not result["only_a"] and not result["changed"]
    (row,) = result["tensors"]
    before = load_file(saved / "one" / "adapter" / OUR_TENSORS)["model.layers.2.mamba.D"]
    # Adding 0.25 rounds once.
    assert row["tensor"] == "model.layers.2.mamba.D" and row["max_abs"] == pytest.approx(0.25, abs=1e-7)
    assert row["relative"] == pytest.approx(row["max_abs"] / float(before.double().norm()))
    code, out, _ = run("diff", str(saved / "one"), str(other))
    assert code == 1 and "model.layers.2.mamba.D" in out and "2.50e-01" in out
    code, out, _ = run("diff", str(saved / "one"), str(other), "--json")
    assert code == 1 and json.loads(out) == result


def test_plans_that_differ(saved: Path, tmp_path: Path, run: Run) -> None:
    result = diff_adapters(str(saved / "one"), str(saved / "two"))
    assert result["only_b"] == [] and len(result["only_a"]) == 14 and result["facts"]["recipe"] == ["all+core", "core"]
    assert all(not key.endswith(("A_log", ".D", "dt_bias")) for key in result["only_a"])
    assert diff_adapters(str(saved / "two"), str(saved / "one"))["only_b"] == result["only_a"]
    code, _, err = run("diff", str(saved / "one"), str(saved / "two"), "--rows", "2")
    assert code == 1 and "recipe: all+core | core" in err and "more lines" in err
    result = diff_adapters(str(saved / "one"), str(save(tmp_path / "wide", rank=3)))
    assert len(result["changed"]) == 14 and not result["only_a"]
    options = result["changed"][0]["differs"]["options"]
    assert (options[0]["rank"], options[1]["rank"]) == (2, 3)
    # Every factor has another shape, and the core is equal but for what the same seed draws after them.
    assert sum(row["max_abs"] is None for row in result["tensors"]) == 28


def test_adapters_are_listed_with_their_hash(saved: Path, run: Run) -> None:
    entries = list_adapters([str(saved)])
    assert [Path(e["directory"]).name for e in entries] == ["adapter", "checkpoint-1", "two"]
    assert [(e["recipe"], e["step"], e["sites"]) for e in entries] == [
        ("all+core", 1, 20),
        ("all+core", 2, 20),
        ("core", 1, 6),
    ]
    assert entries[0]["sha256"] == file_sha256(saved / "one" / "adapter" / OUR_CONFIG)
    assert len({e["sha256"] for e in entries}) == 3 and len({e["base_digest"] for e in entries}) == 1
    code, out, _ = run("adapters", str(saved / "one"), str(saved / "two"), "--json")
    assert code == 0 and json.loads(out) == entries
    code, out, _ = run("adapters", str(saved))
    assert code == 0 and entries[2]["sha256"][:12] in out


def test_a_damaged_adapter_is_listed_as_such(saved: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "two" / OUR_TENSORS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "copy" / "two" / OUR_TENSORS)
    (tmp_path / "copy" / "one" / "adapter" / PEFT_TENSORS).unlink()
    entries = list_adapters([str(tmp_path / "copy")])
    assert [bool(entry["error"]) for entry in entries] == [True, False, True]
    code, out, err = run("adapters", str(tmp_path / "copy"))
    assert code == 1 and entries[1]["sha256"][:12] in out and "missing" in err and "is not the file" in err
    with pytest.raises(ConfigError, match="no adapter directory"):
        list_adapters([str(tmp_path / "copy"), str(tmp_path / "nowhere")])
