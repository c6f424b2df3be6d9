"""Every base tensor is bit for bit what it was."""

from __future__ import annotations

import torch

from ssmtune.base_digest import base_digest
from ssmtune.models import load_model
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.fresh import base_tensors, build_base, dtype_name


def _run(subject: Subject) -> CheckResult:
    """Measured: base tensors that differ. Limit: 0.

    Compared with the base loaded again; where it exists in memory only, with the digest taken when the plan was
    attached, which samples up to 257 values of each tensor.
    """
    adapted = subject.adapted
    tensors = base_tensors(adapted)
    if subject.base_name is None:
        # On a weightless model of the same config, since a digest follows the order of the model's own names.
        same = base_digest(build_base(adapted.base_model.model.config, tensors, device="meta")) == adapted.base_digest
        changed = _untied(adapted.base_model.model, tensors) or ([] if same else ["the base digest"])
        compared = "the digest of the base as attached (257 values of each tensor; the base cannot be loaded by name)"
    else:
        loaded = dict(load_model(subject.base_name, dtype=dtype_name(adapted)).named_parameters())
        changed = sorted(set(loaded) ^ set(tensors))
        for name in loaded.keys() & tensors.keys():
            found = tensors[name].cpu()
            if found.dtype != loaded[name].dtype or not torch.equal(found, loaded[name].detach()):
                changed.append(name)
        compared = f"{subject.base_name}, loaded again, bit for bit"
    return CheckResult(
        name="frozen",
        ok=not changed,
        measured=len(changed),
        limit=0,
        where=", ".join(sorted(changed)[:4]),
        detail=f"{len(tensors)} base tensors compared with {compared}; {len(changed)} differ",
    )


def _untied(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names that a model of this config does not have as tensors of their own: a tie that was broken."""
    fresh = {name for name, _ in build_base(model.config, {}, device="meta").named_parameters()}
    return sorted(set(tensors) ^ fresh)


CHECK = Check(proves="no frozen tensor changed", run=_run)
