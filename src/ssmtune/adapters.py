"""What lies in adapter directories, and how two of them differ, without their base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmtune import adapter_files
from ssmtune.adapter_files import FILES, OUR_CONFIG
from ssmtune.errors import AdapterMismatch, ConfigError
from ssmtune.merge import adapter_directory
from ssmtune.records import file_sha256

if TYPE_CHECKING:
    from ssmtune.adapter_files import SavedAdapter
    from ssmtune.plan import Site


def list_adapters(places: Iterable[str]) -> list[dict[str, Any]]:
    """Return one entry per adapter in `places`: runs, adapter directories, or directories with some below them.

    `sha256` is that of ssmtune.json, which holds those of the tensor files: adapters with the same are the same.
    A directory that is damaged has an entry with `error`. Raises `ConfigError` for a place without any.
    """
    entries = []
    for place in places:
        found = sorted({path.parent for path in Path(place).rglob(OUR_CONFIG)})
        if not found:
            raise ConfigError(f"{place}: holds no adapter directory of ssmtune. Give a run, or a directory with runs.")
        entries += [_describe(directory) for directory in found]
    return entries


def _describe(directory: Path) -> dict[str, Any]:
    try:
        saved = adapter_files.read(directory)
    except AdapterMismatch as error:
        return {"directory": str(directory), "error": str(error)}
    return {
        "directory": str(directory),
        "run_id": saved.run_id,
        "step": saved.step,
        "model": saved.plan.model,
        "base_digest": saved.base_digest,
        "recipe": saved.plan.recipe,
        "sites": len(saved.plan.sites),
        "trainable": saved.plan.trainable,
        "bytes": sum((directory / name).stat().st_size for name in FILES),
        "sha256": file_sha256(directory / OUR_CONFIG),
        "error": "",
    }


def diff_adapters(a: str, b: str) -> dict[str, Any]:
    """Return how the adapters of two runs or directories differ.

    `facts` that are not equal ([a, b] each), `only_a` and `only_b` (sites), `changed` (sites with another method or other
    options), `tensors` with `max_abs` = max |a - b| and `relative` = |a - b| / |a| (Frobenius; None where a is zero) for
    each stored tensor that is not the same bit for bit. Low-rank factors are compared as they are: other factors may
    have the same product. `identical` says that base, sites and tensors are the same; run and step may differ then.
    """
    one, other = (adapter_files.read(adapter_directory(place)) for place in (a, b))
    sites, other_sites = ({site.key: site for site in saved.plan.sites} for saved in (one, other))
    common = [key for key in sites if key in other_sites]
    facts = {
        name: [value, second]
        for name, value, second in (
            ("base_digest", one.base_digest, other.base_digest),
            ("model", one.plan.model, other.plan.model),
            ("recipe", one.plan.recipe, other.plan.recipe),
            ("run_id", one.run_id, other.run_id),
            ("step", one.step, other.step),
        )
        if value != second
    }
    result = {
        "a": str(one.directory),
        "b": str(other.directory),
        "facts": facts,
        "only_a": [key for key in sites if key not in other_sites],
        "only_b": [key for key in other_sites if key not in sites],
        "changed": [_changed(sites[key], other_sites[key]) for key in common if sites[key] != other_sites[key]],
        "tensors": _tensor_differences(one, other),
    }
    differs = result["only_a"] or result["only_b"] or result["changed"] or result["tensors"]
    return {"identical": not differs and "base_digest" not in facts, **result}


def _changed(site: Site, other: Site) -> dict[str, Any]:
    pairs = {name: [value, asdict(other)[name]] for name, value in asdict(site).items() if value != asdict(other)[name]}
    return {"site": site.key, "differs": pairs}


def _tensor_differences(one: SavedAdapter, other: SavedAdapter) -> list[dict[str, Any]]:
    """Rows for the stored tensors that are not equal, or in one of both alone; the furthest apart first."""
    rows: list[dict[str, Any]] = []
    tensors, others = ({**saved.peft_tensors, **saved.our_tensors} for saved in (one, other))
    for name in sorted(set(tensors) & set(others)):
        a, b = tensors[name], others[name]
        if a.shape != b.shape:
            rows.append({"tensor": name, "shapes": [list(a.shape), list(b.shape)], "max_abs": None, "relative": None})
        elif a.dtype != b.dtype or not torch.equal(a, b):
            difference, size = b.double() - a.double(), float(a.double().norm())
            rows.append(
                {
                    "tensor": name,
                    "shapes": [list(a.shape)],
                    "max_abs": float(difference.abs().max()),
                    "relative": float(difference.norm()) / size if size else None,
                }
            )
    for name in sorted(set(tensors) ^ set(others)):
        held = tensors.get(name, others.get(name))
        assert held is not None
        rows.append({"tensor": name, "shapes": [list(held.shape)], "max_abs": None, "relative": None})
    return sorted(rows, key=lambda row: -(float("inf") if row["max_abs"] is None else row["max_abs"]))
