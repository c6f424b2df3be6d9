"""Merge: put the trained values into the base tensors, in fp32, rounded once. The `merge` stage."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import rich.console
import rich.progress
import torch

from ssmtune import adapter_files
from ssmtune.adapter_files import OUR_TENSORS, PEFT_TENSORS, SavedAdapter
from ssmtune.attach import AdaptedModel, load
from ssmtune.base_digest import base_digest
from ssmtune.base_stream import StreamedBase, place_tensor
from ssmtune.base_tensors import base_tensor, owner_of
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.merge_difference import difference_to_training
from ssmtune.merged_files import copy_beside, refuse_merged, refuse_unmergeable, write_provenance
from ssmtune.models import Dtype, load_config, load_model, load_tokenizer, model_location
from ssmtune.peft_layers import module_name
from ssmtune.quantized import dense, other_base_expected, refuse_four_bits
from ssmtune.records import file_sha256
from ssmtune.restore import edited_roles, give_back, restored_rows
from ssmtune.rounding import Survival, Tally, survival_by_role, tally_of
from ssmtune.row_merge import (
    RowMerge,
    await_copies,
    await_rows,
    change_by_rows,
    effective_matrix,
    lora_layer,
    low_rank_rows,
    single_threads,
)
from ssmtune.weight_units import CannotStream, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SMALL_BYTES, NUM_PROMPTS = 1 << 28, 2
"""Up to this size a merged model is also compared with the adapted one in memory, on so many prompts."""


def merge(adapted: AdaptedModel, *, restore: Sequence[str] = ()) -> PreTrainedModel:
    """Return a plain model with every edit of `adapted` in its weights, in the base's dtype; `adapted` is used up.

    Each tensor becomes round(W + change) with the sum in fp32. The edits of the roles in `restore`, with the parts below
    them, are given up: their tensors, or their rows of a tensor, are the base's again.
    A second merge raises `AttachError`, a role that no edit touches `ConfigError`.
    """
    adapted._refuse_spent("merge")
    refuse_unmergeable(adapted.plan)
    return merge_tensors(adapted, restore=restore)


def merge_tensors(adapted: AdaptedModel, *, restore: Sequence[str] = ()) -> PreTrainedModel:
    """Return the plain model with every edit of a tensor in its weights; what is no tensor's is taken off and lost.

    Raises `AttachError` for a base in 4 bits.
    """
    refuse_four_bits(adapted.base_model.model, "merge")
    merged = effective_tensors(adapted)
    _give_back_all(merged, adapted, restore)
    base = adapted.detach()
    with torch.no_grad():
        for path, value in merged.items():
            owner, name = owner_of(base, path)
            tensor = getattr(owner, name)
            tensor.copy_(value.to(tensor.dtype))
    adapted.mark_spent("merged")
    return base


def _give_back_all(values: Mapping[str, torch.Tensor], adapted: AdaptedModel, roles: Sequence[str]) -> None:
    for path, rows in restored_rows(adapted, roles).items():
        give_back(values[path], base_tensor(adapted.base_model.model, path), rows)


def effective_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return for each edited tensor of the base its exact effective value, fp32, by the tensor's name in the base."""
    with torch.no_grad():
        return {path: _effective(adapted, path) for path in edited_roles(adapted.plan)}


def _effective(adapted: AdaptedModel, path: str) -> torch.Tensor:
    sites = [site for site in adapted.plan.sites if site.path == path]
    tensor = base_tensor(adapted.base_model.model, path)
    value, narrow = dense(tensor).detach().float(), tensor.data
    for site in sites:
        if site.container == "module":
            layer = lora_layer(adapted, path, module_name(site))
            if change_of_rows := low_rank_rows(layer):
                return effective_matrix(change_of_rows, dense(tensor).detach())
            # PEFT gives the change of packed experts in the dtype of their tensor, which would round it before the sum.
            if len(site.shape) == 3:
                tensor.data = value
            change: torch.Tensor = layer.get_delta_weight("default").float()
            tensor.data = narrow
            # Into the change, which is new: `value` is the base itself where that is fp32.
            return change.add_(value)
        edit: Any = adapted.edits[site.key]
        training = edit.training
        # On fp32 an edit does not round; dropout is for training alone.
        value = edit.eval()(value).float()
        edit.train(training)
    return value


def survival_report(adapted: AdaptedModel, dtype: torch.dtype = torch.bfloat16) -> list[Survival]:
    """Return for each edited tensor how much of its change survives rounding to `dtype`."""
    roles = edited_roles(adapted.plan)
    with torch.no_grad():
        return [
            tally_of(dense(base_tensor(adapted.base_model.model, path)), value, value.to(dtype)).survival(
                path, roles[path]
            )
            for path, value in effective_tensors(adapted).items()
        ]


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
    core_float32: bool = False,
    make_plain: Callable[[AdaptedModel], PreTrainedModel] | None = None,
    on_message: Callable[[str], None] = warnings.warn,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the merged model of a run (or of an adapter directory and its base) to `out`; return what was merged.

    The base is read and written one tensor at a time. Where its files cannot be proven to be read as transformers reads
    them, the model is merged in memory instead, which `on_message` is told and the result records.
    `make_plain` is `merge`; `widen.widen`, which holds an additional scan as well, in memory; or `merge_tensors`, for a
    caller that takes care of what no tensor holds.
    The directory appears whole or not at all, with weights, config, tokenizer, model card and `ssmtune_merge.json`.
    `core_float32` keeps the core in fp32 in the file, whatever `dtype` the other tensors have.
    Raises `ConfigError` when `out` exists, the base is not known, or the disk is too small; `AdapterMismatch` for a base
    that is not the adapter's, so that a model that is merged already is refused; `AttachError` for what cannot merge.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already. Choose another directory for the merged model, or delete it.")
    directory = adapter_directory(run)
    saved = adapter_files.read(directory)
    if make_plain is None:
        refuse_unmergeable(saved.plan)
    name = model or saved.plan.model
    result: dict[str, Any] = {
        "out": str(out),
        "base": name,
        "base_digest": saved.base_digest,
        "run_id": saved.run_id,
        "step": saved.step,
        "recipe": saved.plan.recipe,
        "trainable": saved.plan.trainable,
        "total": saved.plan.total,
        "adapter_sha256": {file: file_sha256(directory / file) for file in (PEFT_TENSORS, OUR_TENSORS)},
        "restored": list(restore),
        "core_float32": core_float32,
    }
    location = Path(model_location(name))
    refuse_merged(location, result["adapter_sha256"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with other_base_expected(), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        draft = Path(scratch) / "streamed"
        draft.mkdir()
        try:
            if saved.plan.unmergeable:
                raise CannotStream("what was trained is not in tensors of the base alone")
            result |= _stream(saved, name, draft, dtype, restore=restore, core_float32=core_float32, progress=progress)
        except CannotStream as reason:
            if not saved.plan.unmergeable:
                on_message(f"{name}: merged in memory, not tensor by tensor, because {reason}.")
            draft = Path(scratch) / "in-memory"
            draft.mkdir()
            merged = _in_memory(
                saved, name, draft, dtype, restore=restore, core_float32=core_float32, make_plain=make_plain
            )
            result |= merged | {"in_memory": str(reason)}
        if saved.quantized is not None:
            result["quantization"] = difference_to_training(saved, name, draft, _small_prompts(draft))
        write_provenance(draft, result)
        draft.rename(out)
    return result


def _in_memory(
    saved: SavedAdapter,
    name: str,
    draft: Path,
    dtype: Dtype,
    *,
    restore: Sequence[str],
    core_float32: bool,
    make_plain: Callable[[AdaptedModel], PreTrainedModel] | None,
) -> dict[str, Any]:
    """Load, merge and save the whole model; returns the facts of the result."""
    base = load_model(name, dtype=dtype)
    adapted = load(base, saved.directory)
    target = next(base.parameters()).dtype
    roles = edited_roles(saved.plan)
    core = {s.path for s in saved.plan.sites if s.group == "core"} if core_float32 else set()
    exact = effective_tensors(adapted)
    _give_back_all(exact, adapted, restore)
    survival, rounding = [], []
    for path, value in exact.items():
        stored = torch.float32 if path in core else target
        tally = tally_of(base_tensor(adapted.base_model.model, path), value, value.to(stored))
        survival.append(tally.survival(path, roles[path]))
        rounding.append(tally.rounding(path, roles[path]))
    merged = merge(adapted, restore=restore) if make_plain is None else make_plain(adapted)
    with torch.no_grad():
        for path in core & set(exact):
            merged.get_parameter(path).data = exact[path]
    merged.save_pretrained(draft)
    location = Path(model_location(name))
    if location.is_dir():
        copy_beside(location, draft)
    else:
        load_tokenizer(name).save_pretrained(draft)
    return {
        "dtype": str(target).removeprefix("torch."),
        "survival": survival_by_role(survival),
        "rounding": rounding,
        "left_out": [],
        "merged_digest": base_digest(merged),
        "prompts": None,
        "in_memory": "",
    }


def _stream(
    saved: SavedAdapter,
    name: str,
    draft: Path,
    dtype: Dtype,
    *,
    restore: Sequence[str],
    core_float32: bool,
    progress: bool,
) -> dict[str, Any]:
    """Read, change and write the base one tensor at a time; returns the facts of the result.

    Raises `CannotStream` where that cannot be proven to give what merging in memory does.
    """
    base = StreamedBase(name, saved)
    roles = edited_roles(saved.plan)
    core = {s.path for s in saved.plan.sites if s.group == "core"} if core_float32 else set()
    adapted = base.adapted()
    model, restored = adapted.base_model.model, restored_rows(adapted, restore)
    survival, rounding = [], []
    bar = rich.progress.Progress(console=rich.console.Console(stderr=True), disable=not progress)

    def change_whole(unit: Unit, paths: Mapping[str, str]) -> dict[str, Tally]:
        tensors, found = base.read(unit), {}
        for n, path in paths.items():
            tensor = tensors[n]
            place_tensor(model, path, tensor)
            exact = _effective(adapted, path)
            place_tensor(model, path, torch.empty_like(tensor, device="meta"))
            give_back(exact, tensor, restored.get(path, ()))
            tensors[n] = exact.to(output.dtypes[n])
            found[n] = tally_of(tensor, exact, tensors[n])
        output.put(unit, tensors)
        return found

    with bar, base.writer(draft, dtype, core) as output, single_threads() as pool, torch.no_grad():
        jobs: list[Callable[[], dict[str, Tally]]] = []
        for unit in base.units:
            paths = {n: path for n in unit.names if (path := base.path_of(n)) in roles}
            change = change_by_rows(adapted, unit, paths)
            if not paths:
                jobs.append(partial(await_copies, [pool.submit(output.copy, unit, p) for p in output.parts(unit)]))
            elif change is not None:
                ((only, path),) = paths.items()
                rows = RowMerge(unit=unit, change=change, restored=restored.get(path, ()), output=output)
                jobs.append(partial(await_rows, only, [pool.submit(rows.run, part) for part in rows.parts()]))
            else:
                jobs.append(partial(change_whole, unit, paths))
        for job in bar.track(jobs, description="merge"):
            for n, tally in job().items():
                path = base.path_of(n)
                if base.is_first(n):
                    survival.append(tally.survival(path, roles[path]))
                    rounding.append(tally.rounding(path, roles[path]))
        digest = output.finish()
    ids_BT = _small_prompts(draft)
    return {
        "dtype": str(output.dtype).removeprefix("torch."),
        "survival": survival_by_role(survival),
        "rounding": rounding,
        "left_out": base.left_out,
        "merged_digest": digest,
        "prompts": _compare_small(saved, name, draft, base.dtype, restore, ids_BT) if ids_BT is not None else None,
        "in_memory": "",
    }


def _small_prompts(draft: Path) -> torch.Tensor | None:
    """Tokens [B, T] for a merged model that is small enough to be run; None for a larger one."""
    if sum(path.stat().st_size for path in draft.glob("*.safetensors")) > SMALL_BYTES:
        return None
    generator = torch.Generator().manual_seed(0)
    vocab_size = load_config(str(draft)).get_text_config().vocab_size
    return torch.randint(vocab_size, (NUM_PROMPTS, 33), generator=generator)


def _compare_small(
    saved: SavedAdapter, name: str, draft: Path, dtype: torch.dtype, restore: Sequence[str], ids_BT: torch.Tensor
) -> dict[str, Any]:
    """Compare what was streamed with the adapted model in memory: every tensor bit for bit, and some logits.

    Returns the largest and the mean difference of logits, relative to the largest.
    Raises `CheckFailed` for a tensor that is not what merging in memory gives.
    """
    adapted = load(load_model(name, dtype=cast(Dtype, str(dtype).removeprefix("torch."))), saved.directory)
    merged = load_model(str(draft)).eval()
    exact = effective_tensors(adapted)
    _give_back_all(exact, adapted, restore)
    # Before anything runs: RWKV's forward divides weights in place.
    for path, tensor in merged.named_parameters():
        value = exact[path] if path in exact else base_tensor(adapted.base_model.model, path)
        if not torch.equal(tensor, value.to(tensor.dtype)):
            raise CheckFailed(
                f"{path}: the tensor that was written is not the one that merging in memory gives. Nothing is left at the "
                "place named; this is a fault of ssmtune, please report it with the base's config."
            )
    with torch.no_grad():
        expected, found = (model(input_ids=ids_BT, use_cache=False).logits.float() for model in (adapted, merged))
    difference, scale = (found - expected).abs(), float(expected.abs().max())
    return {"num": NUM_PROMPTS, "max": float(difference.max()) / scale, "mean": float(difference.mean()) / scale}
