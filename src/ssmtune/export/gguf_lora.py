"""A LoRA adapter as a GGUF file of its own, which llama.cpp applies to the base's GGUF file at run time.

What the converter does to a weight (rows in another order, factors multiplied in, one tensor split into several) is
linear. So the change of each weight is converted in its place, and what comes out is taken apart into factors again:
the order of Qwen's value heads and the multipliers of Falcon-H1 arrive without being known here.

Dimensions: r rank, I inputs, O outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune import adapter_files
from ssmtune.attach import load
from ssmtune.base_tensors import base_tensor
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export.agreement import check_gguf
from ssmtune.export.base import ExportConfig, Target, refuse_existing, refuse_unmergeable
from ssmtune.export.converter import convert
from ssmtune.export.factors import Factors, alpha_for, full_row_factors, saved_factors, stack_factors, uniform_factors
from ssmtune.export.magnitudes import refuse_magnitudes
from ssmtune.merge import adapter_directory, effective_tensors, merge_to
from ssmtune.models import load_model, load_tokenizer
from ssmtune.records import file_sha256

if TYPE_CHECKING:
    import torch

    from ssmtune.adapter_files import SavedAdapter
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site

NO_LORA_THERE = frozenset({"core", "conv", "norm", "embedding"})
"""Groups whose tensors llama.cpp reads as they are: an adapter for them loads without a word and changes nothing."""

SAME = 1e-5
"""Of the largest weight: how far factors may be from the effective change in fp32, which has lost as much to rounding."""

NULL = 1e-5
"""Of the largest singular value: below it stands what fp32 left of zero."""


def _run(config: ExportConfig) -> dict[str, Any]:
    out = Path(config.out)
    path = out if out.suffix == ".gguf" else out / "adapter.gguf"
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = adapter_files.read(adapter_directory(config.run))
    name = config.model or saved.plan.model
    refuse_unmergeable(saved.plan.sites)
    adapted = load(load_model(name, dtype="float32"), saved.directory)
    changes = low_rank_changes(adapted, saved)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        base, merged = Path(scratch) / "base", Path(scratch) / "merged"
        merge_to(config.run, merged, model=config.model, dtype="float32")
        model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        converted = convert(base, Path(scratch) / "base.gguf", "f32")
        factors = _converted(model, tokenizer, changes, Path(scratch) / "changes")
        draft = Path(scratch) / path.name
        architecture = write_adapter(draft, Path(scratch) / "base.gguf", factors)
        check = check_gguf(Path(scratch) / "base.gguf", merged, type_="f32", lora=draft)
        if not check["ok"]:
            dead = _ignored(Path(scratch) / "base.gguf", base, factors, Path(scratch))
            reason = f" llama.cpp ignores the adapter on {', '.join(dead)}." if dead else ""
            raise CheckFailed(f"{path}: not written. {check['detail']}.{reason} Use --to gguf, which merges.")
        draft.replace(path)
    return {
        "record_path": str(path.with_suffix(".export.json")),
        "files": {path.name: file_sha256(path)},
        "base": name,
        "base_digest": saved.base_digest,
        "architecture": architecture,
        "tensors": sorted(factors),
        "converter": converted,
        "check": check,
        "summary": [
            f"In llama.cpp, on the base as a GGUF file of f32: {check['detail']}; the first new token is the same for "
            f"{check['same_top']} of {check['prompts']} prompts.",
            f"Use it with: llama-cli -m BASE.gguf --lora {path.name}",
        ],
    }


def low_rank_changes(adapted: AdaptedModel, saved: SavedAdapter) -> dict[str, Factors]:
    """Return the factors of the change of each weight, by its path.

    Raises `ConfigError` naming the roles that such a file cannot hold, or that llama.cpp would ignore.
    """
    refuse_magnitudes(saved, "gguf_lora", "llama.cpp", "--to gguf, which merges, or --to peft")
    parts: dict[str, list[Factors]] = {}
    for site in saved.plan.sites:
        found = None if site.group in NO_LORA_THERE or len(site.shape) != 2 else saved_factors(saved, site)
        if found is not None:
            full = full_row_factors(site, *found, base_tensor(adapted.base_model.model, site.path).shape[0])
            parts.setdefault(site.path, []).append((*full, alpha_for(site, full[0])))
    factors = {path: stack_factors(found) for path, found in parts.items()}
    exact = effective_tensors(adapted)
    refused = [site for site in saved.plan.sites if not _is_whole(adapted, site, factors, exact)]
    if refused:
        raise ConfigError(
            f"--to gguf_lora: {len(refused)} sites ({', '.join(sorted({site.role for site in refused}))}) are no low-rank change "
            "of a weight that llama.cpp multiplies with, so it would ignore them. Use --to gguf, which merges."
        )
    return factors


def _is_whole(adapted: AdaptedModel, site: Site, factors: Mapping[str, Factors], exact: Mapping[str, Any]) -> bool:
    """Whether the factors of the site's weight are all of its change."""
    if site.path not in factors or site.path not in exact:
        return False
    A_rI, B_Or, alpha = factors[site.path]
    base_OI = base_tensor(adapted.base_model.model, site.path).detach().float()
    error = exact[site.path] - base_OI - (alpha / A_rI.shape[0]) * (B_Or @ A_rI)
    return bool(error.abs().max() <= SAME * base_OI.abs().max())


def _converted(model: Any, tokenizer: Any, changes: Mapping[str, Factors], scratch: Path) -> dict[str, Factors]:
    """Return factors by the names of llama.cpp: of the model with its changes in the places of its weights."""
    import torch
    from gguf import GGUFReader

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for path, (A_rI, B_Or, alpha) in changes.items():
            base_tensor(model, path).copy_((alpha / A_rI.shape[0]) * (B_Or @ A_rI))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    file = scratch.with_suffix(".gguf")
    convert(scratch, file, "f32")
    rank = max(A_rI.shape[0] for A_rI, _, _ in changes.values())
    found = {}
    for tensor in GGUFReader(file).tensors:
        change_OI = torch.from_numpy(tensor.data.copy())
        if tensor.name.endswith(".weight") and change_OI.dim() == 2 and change_OI.any():
            found[tensor.name] = _factorise(tensor.name, change_OI, rank)
    return uniform_factors(found)


def _factorise(name: str, change_OI: torch.Tensor, rank: int) -> Factors:
    """Return factors of a matrix of at most rank `rank`. Raises `CheckFailed` for a matrix of a higher one."""
    import torch

    change = change_OI.double()
    generator = torch.Generator().manual_seed(0)
    # A matrix of rank r times r random columns or more spans all that it reaches.
    probes = torch.randn(change.shape[1], rank + 4, dtype=torch.float64, generator=generator)
    reached_OK = torch.linalg.qr(change @ probes).Q
    U_KK, s_K, Vh_KI = torch.linalg.svd(reached_OK.T @ change, full_matrices=False)
    num = int((s_K > NULL * s_K[0]).sum())
    B_Or, A_rI = reached_OK @ U_KK[:, :num] * s_K[:num], Vh_KI[:num]
    if num > rank or (B_Or @ A_rI - change).abs().max() > NULL * change.abs().max():
        raise CheckFailed(f"{name}: after conversion its change is no longer of rank {rank}. Use --to gguf.")
    return A_rI.float(), B_Or.float(), float(num)


def write_adapter(path: Path, base: Path, factors: Mapping[str, Factors]) -> str:
    """Write the adapter file for the architecture of the file `base`, and return that. All factors have one rank."""
    from gguf import GGUFReader, GGUFWriter

    field = GGUFReader(base).get_field("general.architecture")
    assert field is not None
    architecture = str(field.contents())
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", next(iter(factors.values()))[2])
    for name, (A_rI, B_Or, _) in factors.items():
        writer.add_tensor(f"{name}.lora_a", A_rI.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", B_Or.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return architecture


def _ignored(base: Path, model: Path, factors: Mapping[str, Factors], scratch: Path) -> list[str]:
    """The kinds of tensors on which an adapter of that kind alone leaves llama.cpp at the base's log-probabilities."""
    dead = []
    for kind in sorted({name.removesuffix(".weight").rpartition(".")[2] for name in factors}):
        path = scratch / f"{kind}.gguf"
        write_adapter(path, base, {name: value for name, value in factors.items() if name.endswith(f".{kind}.weight")})
        if check_gguf(base, model, type_="f32", lora=path, num_tokens=1)["ok"]:
            dead.append(kind)
    return dead


TARGET = Target(
    writes="one GGUF file of LoRA factors, for llama.cpp's `--lora` on the base as a GGUF file",
    proves="llama.cpp, on the base with this file, gives the log-probabilities of the merged model in transformers",
    options=frozenset(),
    run=_run,
)
