"""Merge: put the trained values into the base tensors, in fp32, rounded once. The `merge` stage."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer

from ssmtune import adapter_files
from ssmtune.adapter_files import discarded_paths
from ssmtune.attach import AdaptedModel, load, module_name, owner_of
from ssmtune.errors import ConfigError
from ssmtune.methods.base import get_method
from ssmtune.models import Dtype, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Survival:
    """How much of one tensor's change is left after rounding to a dtype.

    `changed` is the share of elements whose exact value differs from the base, `survives` the share of those that
    still differ after rounding.
    """

    path: str
    role: str
    changed: float
    survives: float
    max_abs_delta: float


def merge(adapted: AdaptedModel) -> PreTrainedModel:
    """Return a plain model with every edit of `adapted` in its weights, in the base's dtype; `adapted` is used up.

    Each tensor becomes round(W + change) with the sum in fp32. A second merge raises `AttachError`.
    """
    adapted._refuse_spent("merge")
    merged = effective_tensors(adapted)
    base = adapted.detach()
    with torch.no_grad():
        for path, value in merged.items():
            owner, name = owner_of(base, path)
            tensor = getattr(owner, name)
            tensor.copy_(value.to(tensor.dtype))
    adapted.mark_spent("merged")
    return base


def effective_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return for each edited tensor of the base its exact effective value, fp32, by the tensor's name in the base."""
    dropped = discarded_paths(adapted.plan)
    values = {}
    with torch.no_grad():
        for site in adapted.plan.sites:
            if site.path in dropped:
                continue
            base, change = _base_and_change(adapted, site.path, module_name(site), get_method(site.method).kind)
            values[site.path] = base.float() + change
    return values


def _base_and_change(adapted: AdaptedModel, path: str, module: str, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "tensor":
        owner, name = owner_of(adapted.base_model.model, path)
        base = owner.parametrizations[name].original
        return base, adapted.edits[path](base).float() - base.float()
    layer: Any = _lora_layer(adapted, path, module)
    base = layer.get_param() if hasattr(layer, "parameter_name") else layer.get_base_layer().weight
    return base, layer.get_delta_weight("default").float()


def _lora_layer(adapted: AdaptedModel, path: str, module: str) -> LoraLayer:
    """PEFT's layer for a site: around the module, or, for packed experts, the one of a chain that holds this tensor."""
    model = adapted.base_model.model
    if path.endswith(".weight"):
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        return layer
    owner, name = owner_of(model, path)
    while isinstance(owner, LoraLayer):
        if getattr(owner, "parameter_name", None) == name:
            return owner
        owner = owner.base_layer
    raise AssertionError(f"no LoRA layer holds {path}")


def survival_report(adapted: AdaptedModel, dtype: torch.dtype = torch.bfloat16) -> list[Survival]:
    """Return for each edited tensor how much of its change survives rounding to `dtype`."""
    report = []
    roles = {site.path: site.role for site in adapted.plan.sites}
    kinds = {site.path: get_method(site.method).kind for site in adapted.plan.sites}
    names = {site.path: module_name(site) for site in adapted.plan.sites}
    with torch.no_grad():
        for path, value in effective_tensors(adapted).items():
            base = _base_and_change(adapted, path, names[path], kinds[path])[0].float()
            changed = value != base
            survived = value.to(dtype) != base.to(dtype)
            num = int(changed.sum())
            report.append(
                Survival(
                    path=path,
                    role=roles[path],
                    changed=num / value.numel(),
                    survives=int((survived & changed).sum()) / num if num else 0.0,
                    max_abs_delta=float((value - base).abs().max()),
                )
            )
    return report


def survival_by_role(report: list[Survival]) -> list[dict[str, Any]]:
    """Return the report averaged over the tensors of each role, for tables."""
    rows = []
    for role in sorted({entry.role for entry in report}):
        members = [asdict(entry) for entry in report if entry.role == role]
        rows.append(
            {
                "role": role,
                "tensors": len(members),
                "changed": sum(m["changed"] for m in members) / len(members),
                "survives": sum(m["survives"] for m in members) / len(members),
                "max_abs_delta": max(m["max_abs_delta"] for m in members),
            }
        )
    return rows


def merge_to(run: str, out: Path, *, model: str | None = None, dtype: Dtype = "auto") -> dict[str, Any]:
    """Write the merged model of a run (or of an adapter directory and its base) to `out`; return what was merged.

    The directory appears whole or not at all, with weights, config, tokenizer and a model card.
    Raises `ConfigError` when `out` exists or the base is not known, `AdapterMismatch` for a base that is not the
    adapter's, so that a model that is merged already is refused.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already. Choose another directory for the merged model, or delete it.")
    directory = Path(run) / "adapter" if (Path(run) / "run.json").is_file() else Path(run)
    saved = adapter_files.read(directory)
    model = model or saved.plan.model
    base = load_model(model, dtype=dtype)
    tokenizer = load_tokenizer(model)
    adapted = load(base, directory)
    target = next(base.parameters()).dtype
    survival = survival_by_role(survival_report(adapted, target))
    merged = merge(adapted)
    result = {
        "out": str(out),
        "base": model,
        "base_digest": saved.base_digest,
        "run_id": saved.run_id,
        "step": saved.step,
        "recipe": saved.plan.recipe,
        "dtype": str(target).removeprefix("torch."),
        "survival": survival,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        merged.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(_model_card(result), encoding="utf-8")
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def _model_card(result: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {row['role']} | {row['tensors']} | {row['changed']:.1%} | {row['survives']:.1%} |"
        for row in result["survival"]
    )
    return (
        f"# Merged model\n\n"
        f"Base `{result['base']}` (digest {result['base_digest']}), adapter of run `{result['run_id']}`, step "
        f"{result['step']}, recipe `{result['recipe']}`, merged by ssmtune in fp32 and rounded once to {result['dtype']}.\n\n"
        f"| role | tensors | elements changed | still changed after rounding |\n|---|---:|---:|---:|\n{rows}\n"
    )
