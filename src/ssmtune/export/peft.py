"""A plain PEFT directory: every low-rank factor under PEFT's own keys, and nothing lost without being told."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from ssmtune import adapter_files
from ssmtune.adapter_files import PEFT_CONFIG, PEFT_TENSORS, SavedAdapter
from ssmtune.attach import load
from ssmtune.base_tensors import owner_of
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export.base import ExportConfig, Target, refuse_existing, refuse_unmergeable
from ssmtune.export.factors import PREFIX, Factors, split_sites
from ssmtune.export.magnitudes import full_magnitudes
from ssmtune.export.plain import compare_logits, own_logits, plain_logits, prompt_tokens
from ssmtune.merge import adapter_directory, effective_tensors
from ssmtune.methods.lora import effective_alpha
from ssmtune.models import load_model, load_tokenizer, model_location
from ssmtune.peft_layers import module_name
from ssmtune.records import file_sha256, write_bytes, write_json
from ssmtune.verify.forward import STEP_TOLERANCE

if TYPE_CHECKING:
    from ssmtune.attach import AdaptedModel
    from ssmtune.plan import Site


def export_peft(
    config: ExportConfig, change: Callable[[dict[str, Factors]], dict[str, Factors]] = dict
) -> dict[str, Any]:
    """Write the directory `config.out` and return the facts of the record; `change` may give the factors another layout.

    Nothing appears unless a fresh process with stock PEFT gives the adapted model's logits.
    """
    out, baked = Path(config.out), Path(config.bake_extras) if config.bake_extras else None
    for path in (out, *([baked] if baked else [])):
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    saved = adapter_files.read(adapter_directory(config.run))
    model = config.model or saved.plan.model
    adapted = load(load_model(model, dtype="float32"), saved.directory)
    factors, extras = split_sites(adapted, saved)
    magnitudes = full_magnitudes(adapted, saved, factors, extras)
    num_packed = sum(len(site.shape) == 3 and site.container == "module" for site in saved.plan.sites)
    _refuse_extras(config, extras, num_low_rank=len(factors) + num_packed)
    prompts = prompt_tokens(model)
    trained = own_logits(adapted, prompts)
    if config.drop_extras:
        for site in extras:
            _switch_off(adapted, site)
    expected = own_logits(adapted, prompts)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        draft, base = Path(scratch) / "adapter", Path(scratch) / "base"
        location = str(baked.resolve()) if baked else model_location(model)
        _write(draft, saved, change(factors), magnitudes, location)
        if baked:
            _write_base(base, model, adapted, extras)
        found = plain_logits(str(base) if baked else model, prompts, adapter=draft, dtype="float32")
        # transformers' own recurrence sums in another order than ours, as a step does; nothing else differs.
        arrived, limit = compare_logits(found, expected), STEP_TOLERANCE[torch.float32]
        if not arrived["max"] <= limit:
            raise CheckFailed(
                f"{out}: not written. In plain PEFT its logits differ from the adapted model's by "
                f"{arrived['max']:.2g} of the largest (limit {limit:g})."
            )
        if baked:
            base.rename(baked)
        draft.rename(out)
    return {
        "record_path": str(out / "export.json"),
        "files": {name: file_sha256(out / name) for name in (PEFT_CONFIG, PEFT_TENSORS)},
        "base": location,
        "base_digest": saved.base_digest,
        "modules": sorted(factors),
        "dropped": [site.key for site in extras] if config.drop_extras else [],
        "baked": [site.key for site in extras] if baked else [],
        "check": {
            "ok": True,
            "limit": limit,
            "plain_to_expected": arrived,
            "export_to_trained": (apart := compare_logits(found, trained)),
        },
        "summary": [
            f"In plain PEFT, in a fresh process: logits within {apart['max']:.2g} of the largest from the trained model's.",
            *([f"Left out, as asked: {', '.join(site.key for site in extras)}."] if config.drop_extras else []),
            *([f"In the new base {baked}, which the adapter now needs: {_roles(extras)}."] if baked else []),
        ],
    }


def _roles(sites: Sequence[Site]) -> str:
    return ", ".join(sorted({site.role for site in sites}))


def _refuse_extras(config: ExportConfig, extras: Sequence[Site], *, num_low_rank: int) -> None:
    if not num_low_rank:
        raise ConfigError(
            f"{config.run}: holds nothing that a PEFT layer could apply ({len(extras)} sites are of other kinds). "
            "Use --to hf, which writes a model with everything in its weights."
        )
    if config.drop_extras and config.bake_extras:
        raise ConfigError("--drop-extras and --bake-extras exclude each other: the extras are lost or kept.")
    if extras and config.bake_extras:
        refuse_unmergeable(extras)
    if extras and not (config.drop_extras or config.bake_extras):
        raise ConfigError(
            f"{config.run}: {len(extras)} of its sites ({_roles(extras)}) do not fit into PEFT's format and would be lost. "
            "Write them into a new base beside the adapter with --bake-extras DIR, give them up with --drop-extras, or "
            "use --to hf."
        )
    if not extras and (config.drop_extras or config.bake_extras):
        raise ConfigError(f"{config.run}: has no extras; all of it fits into PEFT's format. Leave the option out.")


def _switch_off(adapted: AdaptedModel, site: Site) -> None:
    if site.container == "module":
        adapted.base_model.model.get_submodule(module_name(site)).enable_adapters(False)
    else:
        adapted.edits[site.key].enabled = False


def _write(
    directory: Path,
    saved: SavedAdapter,
    factors: Mapping[str, Factors],
    magnitudes: Mapping[str, torch.Tensor],
    base: str,
) -> None:
    """PEFT's two files."""
    fields = json.loads((saved.directory / PEFT_CONFIG).read_text(encoding="utf-8"))
    packed = [s for s in saved.plan.sites if s.container == "module" and len(s.shape) == 3]
    tensors = {
        key: value for key, value in saved.peft_tensors.items() if any(s.path.rpartition(".")[0] in key for s in packed)
    }
    rank, alpha = fields["r"], fields["lora_alpha"]
    if factors and not packed:
        A_rI, _, alpha = next(iter(factors.values()))
        rank = A_rI.shape[0]
    ranks = {s.path: s.options["rank"] for s in packed if s.options["rank"] != rank}
    alphas = {s.path: own for s in packed if (own := effective_alpha(s.options)) != alpha}
    for name, (A_rI, B_Or, own_alpha) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A_rI.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B_Or.contiguous()
        if A_rI.shape[0] != rank:
            ranks[name] = A_rI.shape[0]
        if own_alpha != alpha:
            alphas[name] = own_alpha
    for name, magnitude_O in magnitudes.items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude_O.contiguous()
    fields |= {
        "peft_type": "LORA",
        "use_dora": bool(magnitudes),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
    }
    fields |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    # Packed experts alone need no module; PEFT then wants the list as it was saved.
    fields["target_modules"] = sorted(factors) or fields["target_modules"]
    directory.mkdir()
    write_bytes(directory / PEFT_TENSORS, save(tensors, metadata={"format": "pt"}))
    write_json(directory / PEFT_CONFIG, fields)


def _write_base(directory: Path, model: str, adapted: AdaptedModel, extras: Sequence[Site]) -> None:
    """The base with the extras in its weights, those in fp32 whatever the others are: rounding could undo them."""
    base = load_model(model)
    whole = effective_tensors(adapted) if any(site.container == "module" for site in extras) else {}
    with torch.no_grad():
        for site in extras:
            owner, name = owner_of(base, site.path)
            tensor = getattr(owner, name)
            value = whole[site.path] if site.container == "module" else adapted.edits[site.key](tensor.float())
            tensor.data = value.detach().float()
    base.save_pretrained(directory)
    load_tokenizer(model).save_pretrained(directory)


TARGET = Target(
    writes="adapter_config.json and adapter_model.safetensors as PEFT writes them",
    proves="PeftModel.from_pretrained in a fresh process gives the adapted model's logits",
    options=frozenset({"drop_extras", "bake_extras"}),
    run=export_peft,
)
