"""Low-rank factors as the layouts of others want them: of whole tensors, one pair for each, one rank for all.

Dimensions: r rank, I inputs, O outputs, R rows of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from torch import nn

from ssmtune.base_tensors import base_tensor, names_by_tensor, owner_of
from ssmtune.methods.lora import effective_alpha
from ssmtune.models import weightless
from ssmtune.peft_layers import module_name
from ssmtune.probe import probe

if TYPE_CHECKING:
    from ssmtune.adapter_files import SavedAdapter
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site

PREFIX = "base_model.model."
"""Before every module name in a PEFT file."""

Factors = tuple[torch.Tensor, torch.Tensor, float]
"""A [r, I], B [O, r] and alpha: the change is (alpha / r) B A."""


PAIRS = ({"lora_A", "lora_B"}, {"lora_A", "lora_B", "start_A", "start_B"}, {"lora_A", "lora_B", "lora_magnitude"})
TRIPLETS = {"lora_P", "lora_lambda", "lora_Q"}
"""What an edit of a tensor saves that is, magnitudes aside, a product of two factors."""


def full_row_factors(
    site: Site, A_rI: torch.Tensor, B_Rr: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the whole tensor, A [r, I] and B [num_rows, r], for those of a site: zero rows elsewhere."""
    if site.rows is None:
        return A_rI, B_Rr
    B_Or = B_Rr.new_zeros(num_rows, B_Rr.shape[1])
    taken = 0
    for first, end in site.rows:
        B_Or[first:end] = B_Rr[taken : taken + end - first]
        taken += end - first
    return A_rI, B_Or


def stack_factors(parts: Sequence[Factors]) -> Factors:
    """Return one pair of factors whose change is the sum of those of `parts`: ranks add up, scales move into B."""
    if len(parts) == 1:
        return parts[0]
    A_rI = torch.cat([A for A, _, _ in parts])
    B_Or = torch.cat([B * (alpha / A.shape[0]) for A, B, alpha in parts], dim=1)
    return A_rI, B_Or, float(A_rI.shape[0])


def uniform_factors(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return factors of the same changes that all have the largest rank r, and alpha = r: zeros are added, scales move into B."""
    rank = max(A.shape[0] for A, _, _ in factors.values())
    result = {}
    for name, (A_rI, B_Or, alpha) in factors.items():
        missing = rank - A_rI.shape[0]
        A = torch.cat([A_rI, A_rI.new_zeros(missing, A_rI.shape[1])])
        B = torch.cat([B_Or * (alpha / A_rI.shape[0]), B_Or.new_zeros(B_Or.shape[0], missing)], dim=1)
        result[name] = (A, B, float(rank))
    return result


def split_sites(adapted: AdaptedModel, saved: SavedAdapter) -> tuple[dict[str, Factors], list[Site]]:
    """Return what PEFT's layer can take over, as factors by module name, and the sites that it cannot: the extras.

    A low-rank edit of a tensor becomes a PEFT layer where the tensor is a linear layer's own and every path calls it.
    Stock PEFT refuses `out_proj` of some Mamba families, although transformers' own forward calls it: an extra then.
    Packed experts are not among the factors; they stay as PEFT saved them. DoRA's magnitudes belong to the factors
    (`magnitudes.full_magnitudes`).
    """
    model = adapted.base_model.model
    uses = probe(weightless(model.config))
    names = names_by_tensor(model)
    parts: dict[str, list[Factors]] = {}
    extras = []
    for site in adapted.plan.sites:
        if site.path in saved.discarded or len(site.shape) == 3 and site.container == "module":
            continue
        name = module_name(site)
        found = saved_factors(saved, site)
        layered = found is not None and not _refused_by_peft(adapted, name)
        if layered and site.container == "tensor":
            called = set(uses.of(site.path).values()) == {"CALL"}
            alone = len(names[id(base_tensor(model, site.path))]) == 1
            layered = called and alone and isinstance(owner_of(model, site.path)[0], nn.Linear)
        if not layered or found is None:
            extras.append(site)
            continue
        full = full_row_factors(site, *found, base_tensor(model, site.path).shape[0])
        parts.setdefault(name, []).append((*full, alpha_for(site, full[0])))
    return {name: stack_factors(found) for name, found in parts.items()}, extras


def alpha_for(site: Site, A_rI: torch.Tensor) -> float:
    """Return the alpha of a site's saved factors: over their r, which a start that is subtracted doubles, it is the scale."""
    rank: int = site.options["rank"]
    return effective_alpha(site.options) * (A_rI.shape[0] / rank)


def saved_factors(saved: SavedAdapter, site: Site) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A [r, I] and B [R, r] of a site as they were saved, or None when its edit is no product of such factors.

    A start that is subtracted is among them as further rows and columns. Of weighted triplets those that were not pruned are
    left, their weights in B. DoRA's magnitudes are beside them (`magnitudes.saved_magnitude`).
    """
    if site.container == "module":
        name = PREFIX + module_name(site)
        return saved.peft_tensors[f"{name}.lora_A.weight"], saved.peft_tensors[f"{name}.lora_B.weight"]
    key = f"{site.key}."
    own = {name.removeprefix(key): tensor for name, tensor in saved.our_tensors.items() if name.startswith(key)}
    if own.keys() >= TRIPLETS:
        kept = own["lora_lambda"] != 0
        # PEFT knows no rank of zero; what is kept then has the weight zero.
        kept[0] |= not bool(kept.any())
        return own["lora_Q"][kept], own["lora_P"][:, kept] * own["lora_lambda"][kept]
    if own.keys() not in PAIRS:
        return None
    A_rI, B_Rr = own["lora_A"], own["lora_B"]
    if "start_A" not in own or len(site.shape) == 3:
        return A_rI, B_Rr
    return torch.cat([A_rI, own["start_A"]]), torch.cat([B_Rr, -own["start_B"]], dim=1)


def _refused_by_peft(adapted: AdaptedModel, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(adapted.peft_config["default"], adapted.base_model.model, name.split(".")[-1])
    except ValueError:
        return True
    return False
