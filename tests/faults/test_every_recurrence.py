"""The faults that published studies suffered, planted in a Mamba-1, a parallel Mamba-2 and a Gated DeltaNet model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, tiny_model
from planting import Make, Run
from safetensors.torch import load_file, save_file

from ssmtune import operations
from ssmtune.attach import AdaptedModel, attach, load
from ssmtune.errors import AdapterMismatch, AttachError
from ssmtune.families.base import get_family

CASES: tuple[Case, ...] = tuple(
    (family, sorted(get_family(family).tiny_configs())[0]) for family in ("mamba", "falcon_h1", "qwen3_5")
)
every_recurrence = pytest.mark.parametrize("case", CASES, ids="-".join)


def out_proj(adapted: AdaptedModel) -> tuple[str, Any]:
    """Name and layer of the first recurrent output projection."""
    site = next(s for s in adapted.plan.sites if s.role in ("ssm.out", "gdn.out"))
    name = site.path.removesuffix(".weight")
    return name, adapted.base_model.model.get_submodule(name)


@every_recurrence
def test_sound_adapters_pass(case: Case, make: Make, run: Run, same_process: None) -> None:
    adapted = make(base=tiny_model(case))
    for check in (
        "coverage",
        "liveness",
        "paths_agree",
        "moved",
        "packing",
        "padding",
        "merge",
        "reload",
        "peft_refuses",
    ):
        result = run(check, adapted)
        assert result.ok, (check, result.where, result.detail)


@every_recurrence
def test_targets_that_miss_the_projections(case: Case, make: Make, run: Run) -> None:
    result = run("coverage", make("core", base=tiny_model(case)))
    assert result.ok and "recurrent" in result.where and "recurrent 0 of" in result.detail


@every_recurrence
def test_an_output_projection_that_training_reads_past(case: Case, make: Make, run: Run) -> None:
    adapted = make("recurrent", base=tiny_model(case))
    name, layer = out_proj(adapted)
    whole = layer.forward
    layer.forward = lambda x: layer.base_layer(x) if layer.training else whole(x)
    result = run("liveness", adapted)
    assert not result.ok and f"{name}.lora_B.default.weight on path train" in result.where
    result = run("paths_agree", adapted)
    assert not result.ok and "path train" in result.where


@every_recurrence
def test_a_core_that_is_lost_on_saving(case: Case, make: Make, run: Run, same_process: None) -> None:
    result = run("reload", make("control:core-discarded", base=tiny_model(case)))
    assert not result.ok


@every_recurrence
def test_a_core_tensor_taken_out_of_the_file(case: Case, make: Make, tmp_path: Path) -> None:
    make(base=tiny_model(case)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "ssmtune.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "ssmtune.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterMismatch, match="is not the file that"):
        load(tiny_model(case), tmp_path)


@every_recurrence
def test_halves_of_different_steps(case: Case, make: Make, tmp_path: Path) -> None:
    for steps in (1, 2):
        make(base=tiny_model(case), num_steps=steps).save_pretrained(tmp_path / str(steps), step=steps)
    shutil.copy(tmp_path / "2" / "adapter_model.safetensors", tmp_path / "1" / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match="come from different steps or runs"):
        load(tiny_model(case), tmp_path / "1")


@every_recurrence
def test_a_core_in_place_in_bf16(case: Case, make: Make, run: Run) -> None:
    result = run("moved", make("control:core-in-place", base=tiny_model(case, dtype=torch.bfloat16)))
    assert not result.ok and result.measured < 0.5


@every_recurrence
def test_documents_that_leak(case: Case, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install = operations.install_operations
    monkeypatch.setattr(
        import_module("ssmtune.attach"),
        "install_operations",
        lambda model, family: install(model, replace(family, prepare_packed=None)),
    )
    result = run("packing", make(base=tiny_model(case)))
    assert not result.ok and result.measured > 100 * result.limit


@every_recurrence
def test_weights_that_are_never_loaded(
    case: Case, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, same_process: None
) -> None:
    """What loading into an already wrapped model did in a published study: the fresh adapters stay."""
    adapted = make(base=tiny_model(case))
    with pytest.raises(AttachError, match="already carries adapters"):
        attach(adapted.base_model.model, adapted.plan)
    monkeypatch.setattr(import_module("ssmtune.adapter_files"), "fill", lambda adapted, saved: None)
    result = run("reload", adapted)
    assert not result.ok


@every_recurrence
def test_an_initial_state_that_padding_wears_down(
    case: Case, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make("initial-state", base=tiny_model(case))
    assert run("padding", adapted).ok and run("packing", adapted).ok
    note = operations._note_call

    def forgetful(call: Any) -> Any:
        hook = note(call)

        def without_mask(module: Any, args: Any, kwargs: Any) -> None:
            hook(module, args, kwargs)
            call.padding_mask = None

        return without_mask

    monkeypatch.setattr(operations, "_note_call", forgetful)
    worn = make("initial-state", base=tiny_model(case))
    with torch.no_grad():
        for parameter in worn.trained_parameters().values():
            parameter.add_(0.5)
    result = run("padding", worn)
    assert not result.ok


@every_recurrence
def test_a_state_cannot_be_merged(case: Case, make: Make, run: Run) -> None:
    result = run("merge", make("initial-state", base=tiny_model(case)))
    assert result.ok and "merging is refused" in result.detail
    monkey = import_module("ssmtune.merge")
    with pytest.raises(AttachError, match="cannot merge: method initial_state"):
        monkey.merge(make("initial-state", base=tiny_model(case)))


def test_a_merge_that_is_off_in_one_matrix_of_a_stack(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zamba's x_proj is one tensor of a matrix per head, edited as such: far below what the logits would show."""
    merge = import_module("ssmtune.merge")
    exact = merge.effective_tensors

    def off(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
        tensors = exact(adapted)
        path = next(path for path in tensors if path.endswith("x_proj_weight"))
        tensors[path][1] *= 1 + 1e-6
        return tensors

    adapted = make(base=tiny_model(("zamba", "odd")))
    assert run("merge", adapted).ok
    adapted = make(base=tiny_model(("zamba", "odd")))
    monkeypatch.setattr(merge, "effective_tensors", off)
    result = run("merge", adapted)
    assert not result.ok and "x_proj_weight" in result.where
