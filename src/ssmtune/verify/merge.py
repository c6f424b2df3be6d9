"""Merging gives the adapted model's function, every tensor rounded once; a second merge is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer

from ssmtune.adapter_files import discarded_paths
from ssmtune.attach import load
from ssmtune.base_tensors import base_tensor, owner_of
from ssmtune.errors import AttachError
from ssmtune.merge import merge
from ssmtune.methods.lora import effective_alpha
from ssmtune.models import load_model
from ssmtune.peft_layers import module_name
from ssmtune.quantized import other_base_expected
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import path_logits, relative_difference, tolerance
from ssmtune.verify.fresh import attention_of, dtype_name, fresh_base

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site

ROUNDING_LIMIT = 1.0
SUM_ERROR = 2.0**-21
"""fp32 error of the change itself, relative to the size of its terms: a product of up to some hundred ranks."""


def _run(subject: Subject) -> CheckResult:
    """Measured: largest difference of merged and adapted logits, relative to the largest; limit: the dtype's tolerance.

    A tensor that is not the exact sum rounded once is reported instead: measured is then its error in half units of
    the last place, limit 1.
    """
    if subject.adapted.quantized is not None:
        refused = not _merges_twice(load(fresh_base(subject), subject.directory))
        if subject.base_name is None or not refused:
            detail = f"the base is in 4 bits, its original weights are not at hand, and merging is {_word(refused)}"
            return _result(refused, int(not refused), 0, "" if refused else "the base in 4 bits", detail)
    copy = _on_full_precision(subject)
    lasting = sorted({site.method for site in copy.plan.unmergeable})
    if lasting:
        refused = _merges_twice(copy) is False
        detail = f"{', '.join(lasting)} cannot be merged, and merging is {_word(refused)}"
        return _result(refused, int(not refused), 0, "" if refused else lasting[0], detail)
    ids_BT = subject.documents[0][None].to(copy.base_model.model.device)
    limit = tolerance(copy)
    with torch.no_grad():
        expected = path_logits(copy, "eval", ids_BT)
        exact = _exact_tensors(copy)
        merged = merge(copy)
        logits = path_logits(merged, "eval", ids_BT)
        rounding = {path: _rounding_error(_tensor(merged, path), *exact[path]) for path in exact}
    difference = relative_difference(logits, expected)
    worst = max(rounding, key=lambda path: rounding[path], default="")
    twice = _merges_twice(copy)
    if twice:
        return _result(False, 1, 0, "the merged model", "a second merge was accepted: it would add every change twice")
    if worst and rounding[worst] > ROUNDING_LIMIT:
        detail = f"{worst} is not round(W + change): off by {rounding[worst]:.3g} half units in the last place"
        return _result(False, rounding[worst], ROUNDING_LIMIT, worst, detail)
    where = "" if difference <= limit else f"logits, although all {len(rounding)} tensors are the exact sums"
    detail = f"{len(rounding)} tensors are the exact sum rounded once; logits differ by {difference:.2g} of the largest"
    if subject.adapted.quantized is not None:
        detail += ". Merged into the original weights; merging into the 4 bits that it was trained on is refused"
    return _result(difference <= limit, difference, limit, where, detail)


def _word(refused: bool) -> str:
    return "refused" if refused else "accepted"


def _on_full_precision(subject: Subject) -> AdaptedModel:
    """The saved adapter on a fresh base that it can be merged into."""
    adapted = subject.adapted
    if adapted.quantized is None:
        return load(fresh_base(subject), subject.directory)
    assert subject.base_name is not None
    base = load_model(subject.base_name, dtype=dtype_name(adapted), device=str(adapted.base_model.model.device))
    base.set_attn_implementation(attention_of(adapted))
    with other_base_expected():
        return load(base.eval(), subject.directory)


def _result(ok: bool, measured: float, limit: float, where: str, detail: str) -> CheckResult:
    return CheckResult(name="merge", ok=ok, measured=measured, limit=limit, where=where, detail=detail)


def _merges_twice(spent: AdaptedModel) -> bool:
    """Whether a model that must not be merged (again) is."""
    try:
        merge(spent)
    except AttachError:
        return False
    return True


def _exact_tensors(adapted: AdaptedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each edited tensor: W + change in fp64 from the factors themselves, and the size of its terms.

    Computed apart from `ssmtune.merge`, so that a fault there cannot hide in both.
    Packed experts are left to the logits.
    """
    model = adapted.base_model.model
    dropped = discarded_paths(adapted.plan)
    exact: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for site in adapted.plan.sites:
        if site.path in dropped or (site.container == "module" and len(site.shape) == 3):
            continue
        if site.container == "tensor":
            base = base_tensor(model, site.path).double()
            value, terms = exact.get(site.path, (base, base.abs()))
            exact[site.path] = _edited(adapted.edits[site.key], site, value, terms)
            continue
        layer = model.get_submodule(module_name(site))
        assert isinstance(layer, LoraLayer)
        weight = layer.get_base_layer().weight.double()
        A_rI, B_Or = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
        scale = effective_alpha(site.options) / site.options["rank"]
        value, terms = weight + scale * (B_Or @ A_rI), weight.abs() + scale * (B_Or.abs() @ A_rI.abs())
        if layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector["default"].weight.double()[:, None]
            ratio = magnitude / torch.linalg.vector_norm(value, dim=1, keepdim=True)
            value, terms = ratio * value, ratio.abs() * terms
        exact[site.path] = (value, terms)
    return exact


def _edited(edit: Any, site: Site, value: torch.Tensor, terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`value` and the size of its terms after one more tensor edit."""
    trained = edit.trained()
    if set(trained) != {"lora_A", "lora_B"} or dict(edit.named_buffers()):
        new: torch.Tensor = edit(value.float()).double()
        return new, terms + new.abs()
    scale = effective_alpha(site.options) / site.options["rank"]
    change = scale * (trained["lora_B"].double() @ trained["lora_A"].double())
    size = scale * (trained["lora_B"].double().abs() @ trained["lora_A"].double().abs())
    rows = torch.cat([torch.arange(first, end) for first, end in site.rows or ((0, len(value)),)]).to(value.device)
    return value.index_add(0, rows, change), terms.index_add(0, rows, size)


def _tensor(model: Any, path: str) -> torch.Tensor:
    owner, name = owner_of(model, path)
    tensor: torch.Tensor = getattr(owner, name)
    return tensor


def _rounding_error(merged: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> float:
    """Largest |merged - exact| in units of what one rounding to the dtype may cost, plus the fp32 sum before it."""
    _, exponent = torch.frexp(exact)
    half_unit = torch.ldexp(torch.full_like(exact, torch.finfo(merged.dtype).eps / 4), exponent)
    return float(((merged.double() - exact).abs() / (half_unit + SUM_ERROR * terms).clamp_min(1e-300)).max())


CHECK = Check(
    proves="the merged weights are the adapted model, each rounded once, and merging twice is refused", run=_run
)
