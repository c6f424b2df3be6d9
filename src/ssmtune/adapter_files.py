"""The adapter directory: PEFT's two files, and two of ours for what PEFT cannot hold.

adapter_config.json, adapter_model.safetensors   PEFT's own layout
ssmtune.safetensors                              trained tensors by their name in the base model
ssmtune.json                                     plan, base digest, run, step, and the sha256 of both tensor files

`ssmtune.json` is written last and names the others by digest, so a directory is either complete and of one step or
refused. Where tensors of ours exist, `adapter_config.json` names a PEFT type that does not exist, so that plain PEFT
fails with a message instead of dropping them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save

from ssmtune.base_digest import base_digest
from ssmtune.checkpoint import Entry, inside, read_header
from ssmtune.config import decode, read_json
from ssmtune.errors import AdapterMismatch, ConfigError, PlanMismatch, nearest
from ssmtune.methods.base import Scheduled, get_method
from ssmtune.plan import Plan
from ssmtune.quantized import Quantized, note_other_base, quantized_of
from ssmtune.records import file_sha256, write_bytes, write_json
from ssmtune.selection import put, sparse_edits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.attach import AdaptedModel
    from ssmtune.methods._sparse import Sparse

FORMAT = 1
PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
OUR_CONFIG, OUR_TENSORS = "ssmtune.json", "ssmtune.safetensors"
SMALL_ADAPTER = 1 << 20
"""Parameters that may be allocated for any adapter, however little its files hold."""
FACTS = frozenset(
    {"format", "base_model", "base_digest", "run_id", "step", "plan", "discarded", "values", "sha256", "quantization"}
)
"""Fields of ssmtune.json; the last only where the base was in 4 bits."""
FILES = (PEFT_CONFIG, PEFT_TENSORS, OUR_TENSORS, OUR_CONFIG)


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """A read and checked adapter directory."""

    directory: Path
    plan: Plan
    base_digest: str
    run_id: str
    step: int
    discarded: frozenset[str]
    peft_tensors: Mapping[str, torch.Tensor]
    our_tensors: Mapping[str, torch.Tensor]
    quantized: Quantized | None = None
    """What of the base was in 4 bits when the adapter was trained."""


def write(adapted: AdaptedModel, directory: Path, *, step: int, run_id: str, discard: bool = True) -> None:
    """Write the adapter of `adapted` to `directory`: the tensors first, the file that vouches for them last.

    `discard=False` keeps the tensors that a control throws away and what only training needs: a checkpoint must resume.
    """
    directory.mkdir(parents=True, exist_ok=True)
    factors = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(adapted).items()}
    dropped = discarded_paths(adapted.plan) | _progress(adapted) if discard else set()
    extras = {name: p.detach().cpu().contiguous() for name, p in _kept(adapted, dropped).items()}
    extras |= {f"{key}.index": edit.index.cpu() for key, edit in _chosen(adapted).items()}
    # An older directory is invalid from here until its new ssmtune.json exists.
    (directory / OUR_CONFIG).unlink(missing_ok=True)
    write_bytes(directory / PEFT_TENSORS, save(factors, metadata={"format": "pt"}))
    write_bytes(directory / OUR_TENSORS, save(extras, metadata={"format": "pt"}))
    write_json(directory / PEFT_CONFIG, _peft_config(adapted, extras))
    write_json(
        directory / OUR_CONFIG,
        {
            "format": FORMAT,
            "base_model": adapted.plan.model,
            "base_digest": adapted.base_digest,
            "run_id": run_id,
            "step": step,
            "plan": adapted.plan.to_dict(),
            "discarded": sorted(dropped),
            "values": {s.key: get_method(s.method).value_kind for s in adapted.plan.sites if s.container != "module"},
            "sha256": {name: file_sha256(directory / name) for name in (PEFT_TENSORS, OUR_TENSORS)},
            **({} if adapted.quantized is None else {"quantization": adapted.quantized.to_dict()}),
        },
    )


def discarded_paths(plan: Plan) -> set[str]:
    """Tensors that the plan trains and, as a control, throws away on saving."""
    return {site.path for site in plan.sites if site.options.get("saved") is False}


def _progress(adapted: AdaptedModel) -> set[str]:
    """Names in the file of what only a continuation of the training needs."""
    scheduled = {key: edit for key, edit in adapted.edits.items() if isinstance(edit, Scheduled)}
    return {f"{key}.{name}" for key, edit in scheduled.items() for name in edit.progress()}


def _kept(adapted: AdaptedModel, dropped: Collection[str]) -> dict[str, torch.Tensor]:
    """What the tensor edits train or need and is saved, by the name it has in the file."""
    held: dict[str, torch.Tensor] = {**adapted.edit_parameters(), **adapted.edit_constants()}
    return {name: value for name, value in held.items() if name not in dropped}


def _chosen(adapted: AdaptedModel) -> dict[str, Sparse]:
    """The sparse edits, by key, but for those that are warming up and have no entries of their own."""
    return {key: edit for key, edit in sparse_edits(adapted.edits).items() if edit.stage != "warming up"}


def _peft_config(adapted: AdaptedModel, extras: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    fields = dict(adapted.peft_config["default"].to_dict())
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
    config: dict[str, Any] = json.loads(json.dumps(fields, default=str))
    config["inference_mode"] = True
    config["base_model_name_or_path"] = adapted.plan.model
    if extras:
        edits = [site for site in adapted.plan.sites if site.container != "module"]
        kinds = sorted({site.path.rsplit(".", 1)[-1] if site.group == "core" else site.role for site in edits})
        config["peft_type"] = (
            f"SSMTUNE: this adapter also trained {', '.join(kinds)}, which plain PEFT would drop; "
            "load it with ssmtune.load(base_model, directory)"
        )
    return config


def read(directory: Path) -> SavedAdapter:
    """Read and check an adapter directory, which may come from anybody; its tensors are read last.

    Raises `AdapterMismatch` for files that are missing, damaged, links to elsewhere or of two steps, for a plan that
    claims more than the files hold or keeps what is named as discarded, and for values that are not finite.
    """
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise AdapterMismatch(
            f"{directory}: {', '.join(missing)} missing, so this is no complete adapter directory of ssmtune "
            "(saving may have been interrupted). Use another checkpoint of the run."
        )
    try:
        paths = {name: inside(directory, name) for name in FILES}
        facts = read_json(paths[OUR_CONFIG])
        unknown = sorted(set(facts) - FACTS)
        if unknown:
            raise ConfigError(f"unknown field {unknown[0][:80]!r}; {nearest(unknown[0], FACTS)}")
        plan = Plan.from_dict(facts["plan"])
        digests = facts["sha256"]
        if not isinstance(digests, dict):
            raise ConfigError(f"sha256 is a {type(digests).__name__}, not a digest for each file by name")
        saved_base, run_id, step = str(facts["base_digest"]), str(facts["run_id"]), int(facts["step"])
        version, discarded = facts["format"], frozenset(map(str, facts["discarded"]))
        quantized = Quantized.from_dict(facts["quantization"]) if "quantization" in facts else None
        if quantized is not None and quantized.base_digest != saved_base:
            raise ConfigError(f"quantization is of base {quantized.base_digest}, the adapter of {saved_base}")
    except (PlanMismatch, ConfigError) as error:
        raise AdapterMismatch(f"{directory / OUR_CONFIG}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise AdapterMismatch(
            f"{directory / OUR_CONFIG}: cannot be read ({error!r}). Use another checkpoint."
        ) from None
    if version != FORMAT:
        raise AdapterMismatch(f"{directory}: adapter format {version}; this ssmtune reads {FORMAT}. Update ssmtune.")
    for name in sorted({PEFT_TENSORS, OUR_TENSORS} | set(digests)):
        if name not in (PEFT_TENSORS, OUR_TENSORS) or file_sha256(directory / name) != digests.get(name):
            raise AdapterMismatch(
                f"{directory / name}: is not the file that {OUR_CONFIG} (run {run_id}, step {step}) was saved with. "
                "The two halves of the adapter come from different steps or runs, or one is truncated; "
                "copy the whole directory again."
            )
    try:
        headers = {name: read_header(paths[name]) for name in (PEFT_TENSORS, OUR_TENSORS)}
    except ConfigError as error:
        raise AdapterMismatch(str(error)) from None
    # What lies below a site may be what only training needs; `fill` knows those names.
    below = {name for name in discarded for site in plan.sites if name.startswith(f"{site.key}.")}
    _refuse_other_discards(directory, discarded, discarded_paths(plan) | below)
    _refuse_more_than_is_there(directory, plan, discarded, headers)
    tensors = {name: {key: entry.read() for key, entry in entries.items()} for name, entries in headers.items()}
    for name, found in tensors.items():
        for key, tensor in found.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise AdapterMismatch(
                    f"{directory / name}: {key} holds values that are not finite, so its training diverged or the file was "
                    "altered. Use an earlier checkpoint."
                )
    peft_tensors, our_tensors = tensors[PEFT_TENSORS], tensors[OUR_TENSORS]
    return SavedAdapter(
        directory=directory,
        plan=plan,
        base_digest=saved_base,
        run_id=run_id,
        step=step,
        discarded=discarded,
        peft_tensors=peft_tensors,
        our_tensors=our_tensors,
        quantized=quantized,
    )


def check_base(saved: SavedAdapter, base_model: PreTrainedModel) -> None:
    """Raise `AdapterMismatch` when the adapter was trained on other base weights than `base_model`'s.

    Warns with `QuantizationNote` where the same weights are in 4 bits here or there alone, or with other codes.
    """
    refuse_other_base(saved, base_digest(base_model))
    note_other_base(saved.quantized, quantized_of(base_model), str(saved.directory))


def _refuse_other_discards(directory: Path, discarded: Collection[str], allowed: Collection[str]) -> None:
    """What was trained and is not in the files must be what the plan throws away: anything else would be at its start."""
    others = sorted(set(discarded) - set(allowed))
    if others:
        raise AdapterMismatch(
            f"{directory / OUR_CONFIG}: names {others[0][:200]!r} as discarded on saving, which the plan keeps "
            f"({len(allowed)} tensors may be discarded, {len(others)} others are named). The file was altered; use another "
            "checkpoint."
        )


def _refuse_more_than_is_there(
    directory: Path, plan: Plan, discarded: Collection[str], headers: Mapping[str, Mapping[str, Entry]]
) -> None:
    """Attaching allocates what the plan says, so that must be of the size of the files; `fill` names what is missing."""
    planned = 0
    for site in plan.sites:
        try:
            method = get_method(site.method)
            options = decode(method.Options, site.options, where=f"plan, {site.path}")
        except ConfigError as error:
            raise AdapterMismatch(f"{directory / OUR_CONFIG}: {error}") from None
        if method.num_params(site.shape, options) != site.num_params:
            raise AdapterMismatch(
                f"{directory / OUR_CONFIG}: {site.key} should train {method.num_params(site.shape, options):,} parameters "
                f"by its method and options, the plan says {site.num_params:,}. The file was altered."
            )
        planned += 0 if site.path in discarded else site.num_params
    held = sum(entry.num for entries in headers.values() for entry in entries.values())
    if planned > max(2 * held, SMALL_ADAPTER):
        raise AdapterMismatch(
            f"{directory}: the plan trains {planned:,} parameters, the files hold {held:,}. The directory is incomplete or "
            "was altered; use another checkpoint."
        )


def refuse_other_base(saved: SavedAdapter, found: str) -> None:
    """Raise `AdapterMismatch` when `found` is not the digest of the base that the adapter was trained on."""
    if found != saved.base_digest:
        raise AdapterMismatch(
            f"{saved.directory}: was trained on {saved.plan.model} (base digest {saved.base_digest}); "
            f"the model given has digest {found}. Load the base model it was trained on, in the same precision."
        )


def fill(adapted: AdaptedModel, saved: SavedAdapter) -> None:
    """Put the saved values into the adapters of `adapted`, in place. Raises `AdapterMismatch` for any key or shape left over."""
    expected = get_peft_model_state_dict(adapted)
    _check_keys(saved, PEFT_TENSORS, {k: tuple(v.shape) for k, v in expected.items()}, saved.peft_tensors)
    _refuse_other_discards(saved.directory, saved.discarded, discarded_paths(adapted.plan) | _progress(adapted))
    kept = _kept(adapted, saved.discarded)
    chosen = _chosen(adapted)
    shapes = {name: tuple(parameter.shape) for name, parameter in kept.items()}
    shapes |= {f"{key}.index": tuple(edit.index.shape) for key, edit in chosen.items()}
    _check_keys(saved, OUR_TENSORS, shapes, saved.our_tensors)
    for key, edit in chosen.items():
        fault = edit.fault_of(saved.our_tensors[f"{key}.index"])
        if fault:
            raise AdapterMismatch(
                f"{saved.directory / OUR_TENSORS}: {key}.index {fault}. The directory was altered; use another checkpoint."
            )
    if any(parameter.is_meta for parameter in adapted.parameters()):
        _replace(adapted, saved, kept)
    else:
        set_peft_model_state_dict(adapted, dict(saved.peft_tensors))
        with torch.no_grad():
            for name, parameter in kept.items():
                parameter.copy_(saved.our_tensors[name])
    # Last: entries lie on the device of their deltas, which may just have been replaced.
    put(adapted.edits, {key: saved.our_tensors[f"{key}.index"] for key in chosen})


def _replace(adapted: AdaptedModel, saved: SavedAdapter, kept: Mapping[str, torch.Tensor]) -> None:
    """Put tensors with the saved values in the place of those on the meta device, which take no values."""
    factors = get_peft_model_state_dict(adapted, state_dict=adapted.state_dict(keep_vars=True))
    values = {id(parameter): saved.peft_tensors[key] for key, parameter in factors.items()}
    values |= {id(parameter): saved.our_tensors[name] for name, parameter in kept.items()}
    for module in adapted.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in values:
                value = torch.nn.Parameter(values[id(parameter)], requires_grad=False)
                module._parameters[name] = value
        for name, buffer in module._buffers.items():
            if id(buffer) in values:
                module._buffers[name] = values[id(buffer)]


def _check_keys(
    saved: SavedAdapter, name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]
) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise AdapterMismatch(
            f"{saved.directory / name}: {len(missing)} tensors of the plan are missing {missing[:2]}, "
            f"{len(unknown)} are not in the plan {unknown[:2]}. The directory was altered; use another checkpoint."
        )
    for key, shape in expected.items():
        if tuple(found[key].shape) != shape:
            raise AdapterMismatch(
                f"{saved.directory / name}: {key} has shape {tuple(found[key].shape)}, the plan says {shape}. "
                "The directory was altered; use another checkpoint."
            )
