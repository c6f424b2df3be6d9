"""The base model of an adapter, read from its files one tensor at a time, and the merged one written the same way."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ssmtune import adapter_files
from ssmtune.adapter_files import SavedAdapter, refuse_other_base
from ssmtune.attach import AdaptedModel
from ssmtune.base_digest import digest_of_samples, sample_of, sampled_within
from ssmtune.base_tensors import owner_of
from ssmtune.checkpoint import DTYPES, ShardWriter, read_checkpoint
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.merged_files import copy_beside, write_config
from ssmtune.models import Dtype, load_config, model_location, weightless
from ssmtune.plan import refuse_other_model
from ssmtune.weight_units import FLOATS, CannotStream, Unit, Units, dtypes_on_load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.checkpoint import Entry

SHARD_BYTES = 5_000_000_000
"""Largest file of weights; a larger tensor gets one of its own."""
COPY_PART = 1 << 24
"""Elements that are copied unchanged before another thread may take the next."""
NAMES = {getattr(torch, value): name for name, value in DTYPES.items()}


def load_weightless(model: PreTrainedModel, saved: SavedAdapter) -> AdaptedModel:
    """Return `model`, which is on the meta device, with the adapter and its values on it.

    Nothing runs on it; a merge puts one tensor of the base after the other in with `place_tensor`.
    Raises `PlanMismatch` for another architecture, `AdapterMismatch` for tensors that the plan does not name.
    """
    refuse_other_model(model, saved.plan)
    with warnings.catch_warnings():
        # PEFT and torch warn that values cannot be drawn there, and `fill` brings them.
        warnings.simplefilter("ignore")
        adapted = AdaptedModel(model, saved.plan, digest=saved.base_digest)
        adapter_files.fill(adapted, saved)
    return adapted


def place_tensor(model: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put `tensor` where the base tensor named `path` is, under whatever edits or layers are on it."""
    owner, name = owner_of(model, path)
    if parametrize.is_parametrized(owner, name):
        owner, name = owner.parametrizations[name], "original"
    owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)


class StreamedBase:
    """The base that an adapter was trained on: `units` of tensors, in the order in which they lie in the files.

    Only headers and samples are read here. The precision is the checkpoint's own (`dtype: auto`), or bfloat16 where the
    adapter was trained on the checkpoint rounded to that.
    Raises `AdapterMismatch` for another base, `CannotStream` for files that transformers may read otherwise.
    """

    def __init__(self, name: str, saved: SavedAdapter) -> None:
        self.saved = saved
        self.config = load_config(name)
        self.directory = Path(model_location(name))
        if not self.directory.is_dir():
            raise CannotStream("it is no directory on this machine (download it and give --model DIRECTORY)")
        if "quantization_config" in self.config.to_dict():
            raise CannotStream("its weights are quantised")
        self.entries = read_checkpoint(self.directory)
        self.dtype = _own_dtype(self.config, self.entries)
        self._units = Units(weightless(self.config, dtype=self.dtype), self.entries)
        self.samples = self._units.samples(self._units.dtypes)
        found = digest_of_samples(self._units.in_order(self.samples))
        if found != saved.base_digest and self.dtype != torch.bfloat16:
            narrow = Units(weightless(self.config, dtype=torch.bfloat16), self.entries)
            samples = {name: s.to(narrow.dtypes[name]).float() for name, s in self.samples.items()}
            if digest_of_samples(narrow.in_order(samples)) == saved.base_digest:
                self._units, self.samples, self.dtype, found = narrow, samples, torch.bfloat16, saved.base_digest
        refuse_other_base(saved, found)
        self.left_out = self._units.left_out
        self.units = sorted(self._units.units, key=lambda unit: min((e.file, e.first) for e in unit.entries.values()))

    def adapted(self) -> AdaptedModel:
        """Return a model without weights that has the adapter on it. Raises `CannotStream` where that needs the weights."""
        try:
            adapted = load_weightless(weightless(self.config, dtype=self.dtype), self.saved)
        except RuntimeError as error:  # torch's, for what asks a tensor without values for one
            raise CannotStream(
                f"attaching its adapter needs the base's values ({str(error).splitlines()[0]})"
            ) from None
        for name, value in {**adapted.edit_parameters(), **adapted.edit_constants()}.items():
            if value.is_meta and name not in self.saved.discarded:
                raise CannotStream(f"the edit's {name} is made from the base's values")
        return adapted

    def path_of(self, name: str) -> str:
        """Return the name under which plans know a tensor: the first of its names in the model."""
        return self._units.tied.get(name, [name])[0]

    def is_first(self, name: str) -> bool:
        """Whether `name` is the first of a tensor's names that the checkpoint has; it may have several."""
        return next(n for n in self._units.tied.get(name, [name]) if n in self._units.by_name) == name

    def read(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Return the unit's tensors by their names in the model, as they are after loading."""
        return self._units.read(unit, self._units.dtypes)

    def writer(self, draft: Path, dtype: Dtype, core: Collection[str]) -> MergedWeights:
        """Return a writer of the merged weights to the directory `draft`; tensors in `core` are fp32 in the file.

        Raises `ConfigError` when the disk has no room for them.
        """
        return MergedWeights(self, self._units, draft, dtype, core)


class MergedWeights:
    """Writes the base's tensors, changed or not, to files like the base's own; use it in a `with` block."""

    def __init__(self, base: StreamedBase, units: Units, draft: Path, dtype: Dtype, core: Collection[str]) -> None:
        self._base, self._units, self._draft = base, units, draft
        self.dtype: torch.dtype = base.dtype if dtype == "auto" else getattr(torch, dtype)
        self._on_load = dtypes_on_load(weightless(base.config, dtype=self.dtype))
        self.dtypes = {
            name: torch.float32 if base.path_of(name) in core else kind for name, kind in self._on_load.items()
        }
        tensors = {
            key: (NAMES[self._dtype_of(unit, entry)], entry.shape)
            for unit in base.units
            for key, entry in unit.entries.items()
        }
        needed = sum(self._dtype_of(u, e).itemsize * e.num for u in base.units for e in u.entries.values())
        free = shutil.disk_usage(draft).free
        if needed > free:
            raise ConfigError(
                f"{draft.parent.parent}: the merged weights need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB "
                "free. Make room, or give --out a place on another disk."
            )
        self._writer = ShardWriter(draft, tensors, max_bytes=SHARD_BYTES)
        self.num_bytes = self._writer.num_bytes
        self._samples = {n: s.to(self._on_load[n]).float().clone() for n, s in base.samples.items()}

    def _dtype_of(self, unit: Unit, entry: Entry) -> torch.dtype:
        return self.dtypes[unit.names[0]] if entry.dtype in FLOATS else entry.torch_dtype

    def parts(self, unit: Unit) -> list[tuple[str, int, int]]:
        """Return what `copy` takes at a time: a tensor's name in the checkpoint, its first element, and how many."""
        return [
            (key, start, min(COPY_PART, entry.num - start))
            for key, entry in unit.entries.items()
            for start in range(0, max(1, entry.num), COPY_PART)
        ]

    def copy(self, unit: Unit, part: tuple[str, int, int]) -> None:
        """Write a part of a unit as it is in the base, in the dtype that was asked for."""
        key, start, num = part
        entry = unit.entries[key]
        for block in entry.part(start, num).blocks():
            if entry.dtype in FLOATS:
                block = block.to(self._units.dtypes[unit.names[0]]).to(self.dtypes[unit.names[0]])
            self._writer.write(key, block, start)
            start += len(block)

    def shape_of(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape of a unit that is one tensor, in the checkpoint as in the model."""
        (entry,) = unit.entries.values()
        return entry.shape

    def base_rows(self, unit: Unit, first: int, end: int) -> torch.Tensor:
        """Return rows of a unit that is one matrix, [end - first, I], as they are after loading."""
        (entry,) = unit.entries.values()
        width = entry.shape[1]
        rows = entry.part(first * width, (end - first) * width).read().view(-1, width)
        return rows.to(self._units.dtypes[unit.names[0]])

    def put_rows(self, unit: Unit, first: int, stored_NI: torch.Tensor) -> None:
        """Write rows of a unit that is one matrix, from `first` on, already in the dtype of the file."""
        ((key, entry),) = unit.entries.items()
        (name,) = unit.names
        start = first * entry.shape[1]
        self._writer.write(key, stored_NI, start)
        place, elements = sampled_within(entry.num, start, start + stored_NI.numel())
        if elements:
            taken = stored_NI.reshape(-1)[elements.start - start : elements.stop - start : elements.step]
            self._samples[name][place : place + len(elements)] = taken.to(self._on_load[name])

    def put(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a unit with new values, by their names in the model."""
        ready = {name: tensor.to(self.dtypes[name]) for name, tensor in tensors.items()}
        for key, tensor in self._units.write(unit, ready).items():
            self._writer.write(key, tensor)
        self._samples |= {name: sample_of(t.to(self._on_load[name])) for name, t in ready.items()}

    def finish(self) -> str:
        """Write config and tokenizer, read back what is on the disk and return its base digest.

        Raises `CheckFailed` when that is not what was written.
        """
        self._writer.finish()
        copy_beside(self._base.directory, self._draft)
        write_config(self._base.directory, self._draft, str(self.dtype).removeprefix("torch."))
        expected = digest_of_samples(self._units.in_order(self._samples))
        empty = weightless(load_config(str(self._draft)), dtype=self.dtype)
        written = Units(empty, read_checkpoint(self._draft))
        found = digest_of_samples(written.in_order(written.samples(written.dtypes)))
        if found != expected:
            raise CheckFailed(
                f"{self._draft.name}: not written. The weights on the disk have digest {found}, those that were written "
                f"{expected}. Check the disk and merge again."
            )
        return found

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()


def _own_dtype(config: Any, entries: Mapping[str, Entry]) -> torch.dtype:
    """The dtype that transformers gives a checkpoint for `dtype="auto"`: the config's, else that of its first floats."""
    own = config.dtype
    if own is None:
        own = next(
            (e.torch_dtype for _, e in sorted(entries.items()) if e.torch_dtype.is_floating_point), torch.float32
        )
    dtype: torch.dtype = getattr(torch, own) if isinstance(own, str) else own
    return dtype
