"""Faults of saving, loading and merging: lost or mixed files, an adapter that is never loaded, wrong sums."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planting import Make, Run, make_base
from safetensors.torch import load_file, save_file

from ssmtune.attach import AdaptedModel, load
from ssmtune.base_tensors import base_tensor
from ssmtune.errors import AdapterMismatch
from ssmtune.records import file_sha256
from ssmtune.verify import verify
from ssmtune.verify.base import Subject
from ssmtune.verify.forward import path_logits
from ssmtune.verify.fresh import fresh_base

OURS = "ssmtune.safetensors"
# By name, since `ssmtune.merge` is the function as well as its module.
STAGE = import_module("ssmtune.merge")


def _rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the tensors of ours and vouch for the new file, as a faulty writer would."""
    save_file(tensors, directory / OURS, metadata={"format": "pt"})
    facts = json.loads((directory / "ssmtune.json").read_text())
    facts["sha256"][OURS] = file_sha256(directory / OURS)
    (directory / "ssmtune.json").write_text(json.dumps(facts))


def _saved(adapted: AdaptedModel, directory: Path, step: int = 1) -> Path:
    adapted.save_pretrained(directory, step=step)
    return directory


def test_a_core_that_is_trained_and_thrown_away_fails_in_a_fresh_process(make: Make) -> None:
    """V3, as the control recipe does it on purpose."""
    result = verify(make("control:core-discarded"), checks=["reload"]).checks["reload"]
    assert not result.ok and result.measured > 0 and "not the one in memory" in result.detail


def test_core_tensors_emptied_in_the_file(make: Make, run: Run, same_process: None, tmp_path: Path) -> None:
    adapted = make()
    directory = _saved(adapted, tmp_path / "saved")
    assert run("reload", adapted, directory=directory).ok
    tensors = load_file(directory / OURS)
    _rewrite(directory, {name: torch.zeros_like(value) for name, value in tensors.items()})
    result = run("reload", adapted, directory=directory)
    assert not result.ok and str(directory) in result.where


@pytest.mark.parametrize("fault", ["missing", "other shape", "unknown"])
def test_a_file_with_other_tensors_than_the_plan(
    make: Make, run: Run, same_process: None, tmp_path: Path, fault: str
) -> None:
    adapted = make()
    directory = _saved(adapted, tmp_path / "saved")
    tensors = load_file(directory / OURS)
    name = "model.layers.2.mamba.dt_bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "other shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        name = "model.layers.1.mamba.dt_bias"
        tensors[name] = torch.zeros(8)
    _rewrite(directory, tensors)
    with pytest.raises(AdapterMismatch, match=name):
        load(make_base(), directory)
    result = run("reload", adapted, directory=directory)
    assert not result.ok and name in result.detail and result.where == str(directory)


def test_halves_of_different_steps(make: Make, run: Run, same_process: None, tmp_path: Path) -> None:
    """V4: the adapter of one step beside the side file of another."""
    adapted = make()
    early = _saved(make(num_steps=1), tmp_path / "early", step=1)
    late = _saved(adapted, tmp_path / "late", step=3)
    shutil.copy(early / OURS, late / OURS)
    with pytest.raises(AdapterMismatch, match="different steps"):
        load(make_base(), late)
    result = run("reload", adapted, directory=late)
    assert not result.ok and OURS in result.detail


def test_an_adapter_that_is_never_loaded_because_the_model_was_wrapped_before(
    make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make("attention")

    def wrapped_twice(subject: Subject, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        names = [site.path.removesuffix(".weight") for site in subject.adapted.plan.sites]
        first = get_peft_model(fresh_base(subject), LoraConfig(r=4, lora_alpha=32, target_modules=names))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = PeftModel.from_pretrained(first, str(subject.directory))
        with torch.no_grad():
            return path_logits(model, "eval", ids_BT), path_logits(fresh_base(subject), "eval", ids_BT)

    assert run("peft_refuses", adapted).ok
    monkeypatch.setattr(import_module("ssmtune.verify.reload"), "logits_of_fresh_process", wrapped_twice)
    result = run("reload", adapted)
    assert not result.ok and "nothing that was trained is loaded" in result.detail


def test_a_directory_that_plain_peft_would_load_without_the_core(make: Make, run: Run, tmp_path: Path) -> None:
    adapted = make()
    directory = _saved(adapted, tmp_path / "saved")
    assert run("peft_refuses", adapted, directory=directory).ok
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    result = run("peft_refuses", adapted, directory=directory)
    assert not result.ok and "silently drops 6 trained tensors" in result.detail and OURS in result.where


@pytest.mark.parametrize("fault", ["scale applied twice", "core left out"])
def test_a_wrong_sum_in_the_merge(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    adapted = make()
    assert run("merge", adapted).ok
    exact = STAGE._effective

    def wrong(adapted: AdaptedModel, path: str) -> torch.Tensor:
        base, value = base_tensor(adapted.base_model.model, path).float(), exact(adapted, path)
        if fault == "core left out":
            return base if path.endswith("A_log") else value
        return base + 8 * (value - base) if path.endswith(".weight") else value

    monkeypatch.setattr(STAGE, "_effective", wrong)
    result = run("merge", adapted)
    assert not result.ok
    assert result.where.endswith("A_log" if fault == "core left out" else ".weight")


def test_a_change_that_is_rounded_before_the_sum(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make(dtype=torch.bfloat16)
    assert run("merge", adapted).ok
    exact = STAGE._effective

    def rounded(adapted: AdaptedModel, path: str) -> torch.Tensor:
        base = base_tensor(adapted.base_model.model, path).float()
        return base + (exact(adapted, path) - base).bfloat16().float()

    monkeypatch.setattr(STAGE, "_effective", rounded)
    result = run("merge", adapted)
    assert not result.ok and result.where.endswith("weight") and result.measured > 1


def test_a_merge_that_can_be_repeated(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make()
    once, done = STAGE.merge, []

    def again(model: AdaptedModel) -> Any:
        if not done:
            done.append(once(model))
        return done[0]

    monkeypatch.setattr(import_module("ssmtune.verify.merge"), "merge", again)
    result = run("merge", adapted)
    assert not result.ok and "second merge was accepted" in result.detail
