"""The faults that published studies suffered, planted in Mamba-1, Mamba-2 and Gated DeltaNet models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, operation_names, tiny_model
from fused_kernels import FUSED_KERNELS
from planting import Make, Run, replace_operation
from safetensors.torch import load_file, save_file

from ssmtune import operations
from ssmtune.attach import AdaptedModel, attach, load
from ssmtune.base_tensors import base_tensor
from ssmtune.errors import AdapterMismatch, AttachError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.ops.causal_conv1d import causal_conv1d_update
from ssmtune.verify.forward import TOLERANCE, path_logits, relative_difference


def cases(*families: str) -> pytest.MarkDecorator:
    """Run a test on the first tiny config of each of these families."""
    found: list[Case] = [(family, sorted(get_family(family).tiny_configs())[0]) for family in families]
    return pytest.mark.parametrize("case", found, ids="-".join)


every_recurrence = cases("mamba", "falcon_h1", "qwen3_5")
every_hybrid = cases("jamba", "falcon_h1", "qwen3_5")
# Gated DeltaNet has no kernel that takes the output projection along.
every_fused = cases("mamba", "falcon_h1", "granite_hybrid")


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


@every_hybrid
def test_the_targets_of_tutorials(case: Case, make: Make, run: Run) -> None:
    """V1: the list of names for transformers, on a hybrid. The plan is carried out, so it passes; what it misses is named."""
    result = run("coverage", make("transformer-names", allow_unmatched=True, base=tiny_model(case)))
    assert result.ok and result.where == "not adapted: recurrent, core"
    assert "recurrent 0 of" in result.detail and "nothing in layers" in result.detail


def test_the_targets_of_tutorials_on_a_model_without_any_of_them(make: Make) -> None:
    with pytest.raises(PlacementError, match="q_proj"):
        make("transformer-names", allow_unmatched=True, base=tiny_model(("mamba", "tied")))


@every_fused
def test_a_fused_kernel_that_swallows_out_proj(case: Case, make: Make, run: Run) -> None:
    adapted = make("recurrent", base=tiny_model(case))
    name, _ = out_proj(adapted)
    fused = set(FUSED_KERNELS) & operation_names(case)
    replace_operation(adapted, 0, **{kernel: FUSED_KERNELS[kernel] for kernel in fused})
    result = run("liveness", adapted)
    assert not result.ok and result.measured == 0
    assert f"{name}.lora_A.default.weight on path train" in result.where
    assert f"{name}.lora_B.default.weight on path train" in result.where
    result = run("paths_agree", adapted)
    assert not result.ok and "path train" in result.where
    # Without the adapter the stand-in is the same function: it is the adapter that the path loses.
    with adapted.disable_adapter():
        ids = torch.arange(1, 12)[None]
        logits = [path_logits(adapted, path, ids) for path in ("train", "eval")]
        assert relative_difference(*logits) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("path", ["train", "decode"])
@every_recurrence
def test_an_output_projection_that_a_path_reads_past(case: Case, make: Make, run: Run, path: str) -> None:
    adapted = make("recurrent", base=tiny_model(case))
    name, layer = out_proj(adapted)
    whole = layer.forward

    def past(x: torch.Tensor) -> Any:
        return layer.base_layer(x) if (layer.training if path == "train" else x.shape[1] == 1) else whole(x)

    layer.forward = past
    result = run("liveness", adapted)
    assert not result.ok and f"{name}.lora_B.default.weight on path {path}" in result.where
    result = run("paths_agree", adapted)
    assert not result.ok and f"path {path}" in result.where


@every_recurrence
def test_a_convolution_state_that_is_off_by_one(case: Case, make: Make, run: Run) -> None:
    def shifted(x: torch.Tensor, state: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = causal_conv1d_update(x, state, *args, **kwargs)
        state.copy_(state.roll(1, -1))
        return out

    adapted = make(base=tiny_model(case))
    replace_operation(adapted, 0, causal_conv1d_update=shifted)
    result = run("paths_agree", adapted)
    assert not result.ok and "path decode" in result.where


@every_recurrence
def test_a_core_that_is_lost_on_saving(case: Case, make: Make, run: Run, same_process: None) -> None:
    """V3: the core is trained, and the directory that is loaded again does not hold it."""
    result = run("reload", make("control:core-discarded", base=tiny_model(case)))
    assert not result.ok and "the saved adapter is not the one in memory" in result.detail


@every_recurrence
def test_a_core_tensor_taken_out_of_the_file(
    case: Case, make: Make, run: Run, same_process: None, tmp_path: Path
) -> None:
    adapted = make(base=tiny_model(case))
    adapted.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "ssmtune.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "saved" / "ssmtune.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterMismatch, match="is not the file that"):
        load(tiny_model(case), tmp_path / "saved")
    result = run("reload", adapted, directory=tmp_path / "saved")
    assert not result.ok and "ssmtune.safetensors" in result.detail


@every_recurrence
def test_halves_of_different_steps(case: Case, make: Make, run: Run, same_process: None, tmp_path: Path) -> None:
    """V4: the adapter of one step beside the side file of another."""
    for steps in (1, 2):
        adapted = make(base=tiny_model(case), num_steps=steps)
        adapted.save_pretrained(tmp_path / str(steps), step=steps)
    shutil.copy(tmp_path / "1" / "ssmtune.safetensors", tmp_path / "2" / "ssmtune.safetensors")
    with pytest.raises(AdapterMismatch, match="come from different steps or runs"):
        load(tiny_model(case), tmp_path / "2")
    result = run("reload", adapted, directory=tmp_path / "2")
    assert not result.ok and "ssmtune.safetensors" in result.detail


@every_recurrence
def test_a_nudged_frozen_tensor(case: Case, make: Make, run: Run) -> None:
    adapted = make("recurrent", base=tiny_model(case))
    assert run("frozen", adapted).ok
    with torch.no_grad():
        out_proj(adapted)[1].base_layer.weight[0, 0] += 1e-6
    result = run("frozen", adapted)
    assert not result.ok


@every_recurrence
def test_a_scale_that_is_applied_twice(case: Case, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = import_module("ssmtune.merge")
    exact = stage._effective

    def doubled(adapted: AdaptedModel, path: str) -> torch.Tensor:
        base = base_tensor(adapted.base_model.model, path).float()
        return base + 2 * (exact(adapted, path) - base) if path.endswith("out_proj.weight") else exact(adapted, path)

    adapted = make(base=tiny_model(case))
    monkeypatch.setattr(stage, "_effective", doubled)
    result = run("merge", adapted)
    assert not result.ok and result.where.endswith("out_proj.weight")


@every_recurrence
def test_a_core_in_place_in_bf16(case: Case, make: Make, run: Run) -> None:
    """bf16 keeps 8 bits, so that a step of AdamW on a value of order 1 rounds away."""
    result = run("moved", make("control:core-in-place", base=tiny_model(case, dtype=torch.bfloat16)))
    assert not result.ok and result.measured < 0.5 and "dt" in result.where


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
    # The first document has nothing before it to see.
    assert "document 1 of 3" in result.where or "document 2 of 3" in result.where


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
    assert not result.ok and "nothing that was trained is loaded" in result.detail


@every_recurrence
def test_an_initial_state_that_padding_wears_down(
    case: Case, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = make("initial-state", base=tiny_model(case))
    assert run("padding", adapted).ok and run("packing", adapted).ok
    note = operations._note_call

    def forgetful(call: Any, family: Any) -> Any:
        hook = note(call, family)

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
    assert not result.ok and "left padding" in result.where


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
