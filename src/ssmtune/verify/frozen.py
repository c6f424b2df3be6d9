"""Every base tensor is bit for bit what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssmtune.base_digest import weights_digest
from ssmtune.quantize import load_base
from ssmtune.quantized import is_quantized, scales_of
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.fresh import base_tensors, build_base, dtype_name, quantize_config_of

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel


def _run(subject: Subject) -> CheckResult:
    """Measured: base tensors that differ. Limit: 0.

    Compared with the base loaded again; where it exists in memory only, with the digest taken when the plan was
    attached, which samples up to 257 values of each tensor.
    """
    adapted = subject.adapted
    tensors = base_tensors(adapted)
    if subject.base_name is None:
        # On a weightless model of the same config, since a digest follows the order of the model's own names.
        expected = adapted.base_digest if adapted.quantized is None else adapted.quantized.digest
        same = weights_digest(build_base(adapted.base_model.model.config, tensors, device="meta")) == expected
        changed = _untied(adapted.base_model.model, tensors) or ([] if same else ["the base digest"])
        compared = "the digest of the base as attached (257 values of each tensor; the base cannot be loaded by name)"
    else:
        # Codes depend on the device that rounded: what is in 4 bits is quantised again where it is now.
        device = str(adapted.base_model.model.device) if adapted.quantized is not None else None
        base = load_base(
            subject.base_name, dtype=dtype_name(adapted), device=device, quantize_config=quantize_config_of(adapted)
        )
        loaded = dict(base.named_parameters())
        changed = sorted(set(loaded) ^ set(tensors))
        changed += [name for name in loaded.keys() & tensors.keys() if not _same(tensors[name], loaded[name])]
        compared = f"{subject.base_name}, loaded again, bit for bit"
    return CheckResult(
        name="frozen",
        ok=not changed,
        measured=len(changed),
        limit=0,
        where=", ".join(sorted(changed)[:4]),
        detail=f"{len(tensors)} base tensors{_held(adapted)} compared with {compared}; {len(changed)} differ",
    )


def _held(adapted: AdaptedModel) -> str:
    return "" if adapted.quantized is None else f" ({len(adapted.quantized.paths)} as 4-bit codes and scales)"


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit; of two in 4 bits, codes and scales."""
    if found.dtype != expected.dtype or is_quantized(found) != is_quantized(expected):
        return False
    pairs = [(found.detach(), expected.detach())]
    if is_quantized(found):
        pairs += zip(scales_of(found).values(), scales_of(expected).values(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def _untied(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names that a model of this config does not have as tensors of their own: a tie that was broken."""
    fresh = {name for name, _ in build_base(model.config, {}, device="meta").named_parameters()}
    return sorted(set(tensors) ^ fresh)


CHECK = Check(proves="no frozen tensor changed", run=_run)
