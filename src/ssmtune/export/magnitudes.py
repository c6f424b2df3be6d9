"""DoRA's magnitudes: in PEFT's layout one for each row of a whole tensor; other programs do not apply them.

Dimensions: r rank, I inputs, O outputs, R rows of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ssmtune.base_tensors import base_tensor
from ssmtune.errors import ConfigError
from ssmtune.export.factors import PREFIX, Factors
from ssmtune.peft_layers import module_name

if TYPE_CHECKING:
    from ssmtune.adapter_files import SavedAdapter
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site


def saved_magnitude(saved: SavedAdapter, site: Site) -> torch.Tensor | None:
    """Return the magnitudes [R] of a site that DoRA trained, as they were saved; None for another."""
    if site.container == "module":
        return saved.peft_tensors.get(f"{PREFIX}{module_name(site)}.lora_magnitude_vector")
    magnitude = saved.our_tensors.get(f"{site.key}.lora_magnitude")
    return None if magnitude is None else magnitude.flatten()


def full_magnitudes(
    adapted: AdaptedModel, saved: SavedAdapter, factors: Mapping[str, Factors], extras: Sequence[Site]
) -> dict[str, torch.Tensor]:
    """Return the magnitude of each row [O] of every tensor in `factors`; nothing where the adapter has no DoRA among them.

    PEFT has one switch for an adapter, so rows that DoRA did not train get the norm that they have with their factors.
    Raises `ConfigError` where PEFT's layer would divide by zero, or where `extras` train other rows of such a tensor.
    """
    sites = [site for site in saved.plan.sites if module_name(site) in factors and site not in extras]
    own = {site.key: saved_magnitude(saved, site) for site in sites}
    if all(magnitude is None for magnitude in own.values()):
        return {}
    found: dict[str, torch.Tensor] = {}
    for site in sites:
        name = module_name(site)
        if name not in found:
            found[name] = _norms(adapted, site, factors[name], extras)
        magnitude = own[site.key]
        if magnitude is not None:
            ranges = site.rows or ((0, len(magnitude)),)
            found[name][torch.cat([torch.arange(first, end) for first, end in ranges])] = magnitude.float()
    return found


def _norms(adapted: AdaptedModel, site: Site, factors: Factors, extras: Sequence[Site]) -> torch.Tensor:
    """The norm [O] of each row of a site's whole tensor with what `factors` add to it."""
    beside = sorted({extra.role for extra in extras if extra.path == site.path})
    if beside:
        raise ConfigError(
            f"{site.path}: PEFT's DoRA holds a magnitude for every row of it, and {', '.join(beside)} of the same tensor is "
            "trained in a way that no adapter of PEFT's can hold. Use --to hf, which writes the merged model."
        )
    A_rI, B_Or, alpha = factors
    weight_OI = base_tensor(adapted.base_model.model, site.path).detach().float().cpu()
    norms: torch.Tensor = torch.linalg.vector_norm(weight_OI + (alpha / A_rI.shape[0]) * (B_Or @ A_rI), dim=1)
    if not bool(norms.all()):
        raise ConfigError(
            f"{site.path}: {int((norms == 0).sum())} of its rows are zero with what was trained, and PEFT's DoRA divides by "
            "the norm of each. Use --to hf, which writes the merged model."
        )
    return norms


def refuse_magnitudes(saved: SavedAdapter, target: str, program: str, instead: str) -> None:
    """Raise `ConfigError` where magnitudes were trained, which `program` does not apply; `instead` names other targets."""
    scaled = [site for site in saved.plan.sites if saved_magnitude(saved, site) is not None]
    if scaled:
        raise ConfigError(
            f"--to {target}: {len(scaled)} sites ({', '.join(sorted({site.role for site in scaled}))}) have magnitudes of "
            f"their rows, trained by {scaled[0].method!r}; {program} applies A and B alone. Use {instead}."
        )
