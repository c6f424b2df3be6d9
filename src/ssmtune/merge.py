"""Merge: put the trained values into the base tensors, in fp32, rounded once. The `merge` stage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer

from ssmtune import adapter_files
from ssmtune.adapter_files import discarded_paths
from ssmtune.attach import AdaptedModel, base_tensor, load, owner_of
from ssmtune.errors import AttachError, ConfigError, nearest
from ssmtune.inventory import take_inventory
from ssmtune.methods._low_rank import decomposed
from ssmtune.models import Dtype, load_model, load_tokenizer, weightless
from ssmtune.peft_layers import module_name
from ssmtune.placement import is_below, touches

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


def merge(adapted: AdaptedModel, *, restore: Sequence[str] = ()) -> PreTrainedModel:
    """Return a plain model with every edit of `adapted` in its weights, in the base's dtype; `adapted` is used up.

    Each tensor becomes round(W + change) with the sum in fp32. The edits of the roles in `restore`, with the parts below
    them, are given up: their tensors, or their rows of a tensor, are the base's again.
    A second merge raises `AttachError`, a role that no edit touches `ConfigError`.
    """
    adapted._refuse_spent("merge")
    _refuse_unmergeable(adapted)
    return merge_tensors(adapted, restore=restore)


def merge_tensors(adapted: AdaptedModel, *, restore: Sequence[str] = ()) -> PreTrainedModel:
    """Return the plain model with every edit of a tensor in its weights; what is no tensor's is taken off and lost."""
    merged = effective_tensors(adapted)
    if restore:
        _restore(adapted, merged, restore)
    base = adapted.detach()
    with torch.no_grad():
        for path, value in merged.items():
            owner, name = owner_of(base, path)
            tensor = getattr(owner, name)
            tensor.copy_(value.to(tensor.dtype))
    adapted.mark_spent("merged")
    return base


def _restore(adapted: AdaptedModel, merged: dict[str, torch.Tensor], roles: Sequence[str]) -> None:
    """Put the base's values back into `merged`, for the components of these roles."""
    model = adapted.base_model.model
    inventory = take_inventory(weightless(model.config))
    for role in roles:
        named = [c for c in (*inventory.components, *inventory.segments) if is_below(c.role, role)]
        found = [c for c in named if c.path in merged]
        edited = {s.path: [o.rows for o in adapted.plan.sites if o.path == s.path] for s in adapted.plan.sites}
        found = [c for c in found if any(touches(c.rows, rows) for rows in edited[c.path])]
        if not found:
            trained = sorted({site.role for site in adapted.plan.sites})
            raise ConfigError(
                f"restore {role!r}: no edit of this adapter touches it; {nearest(role, trained)}. Leave it out."
            )
        for component in found:
            base = base_tensor(model, component.path).float()
            for first, end in component.rows or ((0, len(base)),):
                merged[component.path][first:end] = base[first:end]


def _refuse_unmergeable(adapted: AdaptedModel) -> None:
    lasting = sorted({site.method for site in adapted.plan.unmergeable})
    if lasting:
        raise AttachError(
            f"cannot merge: method {', '.join(lasting)} adds what no tensor of the base can hold, so a merged model would "
            "drop it. Use the adapter with ssmtune.load(base, directory); an additional scan can become a model with more "
            "states (ssmtune.widen.widen, 'ssmtune export --to hf')."
        )


def effective_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return for each edited tensor of the base its exact effective value, fp32, by the tensor's name in the base."""
    dropped = discarded_paths(adapted.plan)
    sites = [site for site in adapted.plan.sites if not site.is_added and site.path not in dropped]
    paths = dict.fromkeys(site.path for site in sites)
    with torch.no_grad():
        return {path: _effective(adapted, path) for path in paths}


def _effective(adapted: AdaptedModel, path: str) -> torch.Tensor:
    sites = [site for site in adapted.plan.sites if site.path == path]
    value = base_tensor(adapted.base_model.model, path).float()
    for site in sites:
        if site.container == "module":
            layer = _lora_layer(adapted, path, module_name(site))
            value = value + layer.get_delta_weight("default").float()
            if layer.lora_magnitude_vector:
                value = decomposed(value, layer.lora_magnitude_vector["default"].weight[:, None])
            return value
        edit: Any = adapted.edits[site.key]
        training = edit.training
        # On fp32 an edit does not round; dropout is for training alone.
        value = edit.eval()(value).float()
        edit.train(training)
    return value


def _lora_layer(adapted: AdaptedModel, path: str, module: str) -> Any:
    """PEFT's layer for a site: around the module, or, for packed experts, the one of a chain that holds this tensor."""
    model = adapted.base_model.model
    if path.endswith(".weight"):
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        return layer
    parent, _, name = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    while isinstance(owner, LoraLayer):
        if getattr(owner, "parameter_name", None) == name:
            return owner
        owner = owner.base_layer
    raise AssertionError(f"no LoRA layer holds {path}")


def survival_report(adapted: AdaptedModel, dtype: torch.dtype = torch.bfloat16) -> list[Survival]:
    """Return for each edited tensor how much of its change survives rounding to `dtype`."""
    report = []
    roles = {site.path: site.role for site in adapted.plan.sites}
    with torch.no_grad():
        for path, value in effective_tensors(adapted).items():
            base = base_tensor(adapted.base_model.model, path).float()
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


def adapter_directory(run: str) -> Path:
    """Return the adapter directory of a run; another directory is taken to be one."""
    return Path(run) / "adapter" if (Path(run) / "run.json").is_file() else Path(run)


def merge_to(
    run: str,
    out: Path,
    *,
    model: str | None = None,
    dtype: Dtype = "auto",
    restore: Sequence[str] = (),
    make_plain: Callable[[AdaptedModel], PreTrainedModel] | None = None,
) -> dict[str, Any]:
    """Write the merged model of a run (or of an adapter directory and its base) to `out`; return what was merged.

    `make_plain` is `merge`, or `widen.widen`, which holds an additional scan as well.
    The directory appears whole or not at all, with weights, config, tokenizer and a model card.
    Raises `ConfigError` when `out` exists or the base is not known, `AdapterMismatch` for a base that is not the
    adapter's, so that a model that is merged already is refused.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already. Choose another directory for the merged model, or delete it.")
    directory = adapter_directory(run)
    saved = adapter_files.read(directory)
    model = model or saved.plan.model
    base = load_model(model, dtype=dtype)
    tokenizer = load_tokenizer(model)
    adapted = load(base, directory)
    target = next(base.parameters()).dtype
    survival = survival_by_role(survival_report(adapted, target))
    merged = merge(adapted, restore=restore) if make_plain is None else make_plain(adapted)
    result = {
        "out": str(out),
        "base": model,
        "base_digest": saved.base_digest,
        "run_id": saved.run_id,
        "step": saved.step,
        "recipe": saved.plan.recipe,
        "dtype": str(target).removeprefix("torch."),
        "restored": list(restore),
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
    restored = f"Restored to the base's values: {', '.join(result['restored'])}.\n\n" if result["restored"] else ""
    return (
        f"# Merged model\n\n"
        f"Base `{result['base']}` (digest {result['base_digest']}), adapter of run `{result['run_id']}`, step "
        f"{result['step']}, recipe `{result['recipe']}`, merged by ssmtune in fp32 and rounded once to {result['dtype']}.\n\n"
        f"{restored}"
        f"| role | tensors | elements changed | still changed after rounding |\n|---|---:|---:|---:|\n{rows}\n"
    )
