"""The tensors of a checkpoint under the names that a model gives them, one unit at a time.

A checkpoint may hold its tensors under other names, or cut otherwise (one tensor per expert), than the model does.
transformers says how: its own conversion is applied here to one unit of tensors that belong together, and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ssmtune.base_digest import Sample, sample_every, sample_of
from ssmtune.errors import SsmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ssmtune.checkpoint import Entry

FLOATS = ("F32", "BF16", "F16")


class CannotStream(SsmtuneError):
    """A checkpoint that this module cannot prove it reads as transformers does; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Tensors of a checkpoint that become tensors of the model together: usually one and one.

    `converter` is transformers' conversion where that is more than a name.
    """

    entries: Mapping[str, Entry]
    names: tuple[str, ...]
    converter: Any = None


class Units:
    """A checkpoint as units of a model on the meta device. `left_out` are tensors that the model has no use for.

    Raises `CannotStream` where a tensor of the model would not come from the checkpoint as it is.
    """

    def __init__(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model = model
        self.state: dict[str, torch.Tensor] = model.state_dict()
        self._transforms = get_model_conversion_mapping(model)
        self.left_out: list[str] = []
        self.units = self._group(entries)
        self.by_name = {name: unit for unit in self.units for name in unit.names}
        self.dtypes = dtypes_on_load(model)
        self.tied = _tied(model)
        self._check(entries)

    def _group(self, entries: Mapping[str, Entry]) -> tuple[Unit, ...]:
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        converters = {p: t for t in self._transforms if isinstance(t, WeightConverter) for p in t.source_patterns}
        parts: dict[str, dict[str, tuple[Entry, str | None]]] = {}
        # In transformers' order: some of its rules depend on what came before.
        for key in sorted(entries, key=dot_natural_key):
            name, pattern = self._rename(key)
            if name in self.state:
                parts.setdefault(name, {})[key] = (entries[key], pattern)
            else:
                self.left_out.append(key)
        units = []
        for name, members in parts.items():
            found = {key: entry for key, (entry, _) in members.items()}
            patterns = {key: pattern for key, (_, pattern) in members.items() if pattern is not None}
            if not patterns and len(found) == 1:
                units.append(Unit(entries=found, names=(name,)))
                continue
            if len(patterns) != len(found):
                raise CannotStream(f"{', '.join(sorted(found)[:3])} all become {name}")
            converter = deepcopy(converters[next(iter(patterns.values()))])
            converter.collected_tensors.clear()
            unit = Unit(entries=found, names=(), converter=(converter, name, patterns))
            # On the meta device: names and shapes, nothing else.
            there = self._convert(unit, {key: _empty(entry) for key, entry in found.items()})
            back = self._revert(there)
            shapes = {key: tuple(tensor.shape) for key, tensor in back.items()}
            if shapes != {key: entry.shape for key, entry in found.items()}:
                raise CannotStream(f"transformers' conversion of {name} has no way back")
            units.append(Unit(entries=found, names=tuple(there), converter=unit.converter))
        return tuple(units)

    def _rename(self, key: str) -> tuple[str, str | None]:
        """transformers' name of a checkpoint's tensor, as its loader finds it."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in self._transforms if isinstance(t, WeightConverter)]
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self.state)
        if name not in self.state and key in self.state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=self.state)
        return name, pattern

    def _check(self, entries: Mapping[str, Entry]) -> None:
        covered = set(self.by_name)
        missing = sorted(name for name in self.state if not covered & set(self.tied.get(name, [name])))
        if missing:
            raise CannotStream(
                f"{len(missing)} tensors of the model are not in the checkpoint ({', '.join(missing[:3])})"
            )
        for unit in self.units:
            for key, entry in unit.entries.items():
                floating = entry.torch_dtype.is_floating_point
                if floating and entry.dtype not in FLOATS:
                    raise CannotStream(f"{key} has dtype {entry.dtype}")
                if floating != self.state[unit.names[0]].is_floating_point():
                    raise CannotStream(
                        f"{key} is {entry.dtype}, the model's tensor is {self.state[unit.names[0]].dtype}"
                    )
                if unit.converter is None and entry.shape != tuple(self.state[unit.names[0]].shape):
                    raise CannotStream(
                        f"{key} has shape {entry.shape}, the model says {tuple(self.state[unit.names[0]].shape)}"
                    )
        for names in self.tied.values():
            units = [self.by_name[name] for name in names if name in covered]
            if len(units) > 1 and not all(_equal(units[0], other) for other in units[1:]):
                raise CannotStream(f"{' and '.join(names)} are tied in the model and differ in the checkpoint")

    def read(self, unit: Unit, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Return the unit's tensors under the model's names, in the dtypes that the model gives them on loading."""
        tensors = {key: entry.read().to(dtypes[unit.names[0]]) for key, entry in unit.entries.items()}
        return self._convert(unit, tensors)

    def write(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return `tensors` (by the model's names) under the checkpoint's names, cut as there.

        Raises `CannotStream` where reading them again would not give the same.
        """
        if unit.converter is None:
            return {next(iter(unit.entries)): tensors[unit.names[0]]}
        back = self._revert(tensors)
        again = self._convert(unit, back)
        if any(not torch.equal(again[name], tensors[name]) for name in unit.names):
            raise CannotStream(f"transformers' conversion of {unit.names[0]} and back gives other values")
        return back

    def _convert(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if unit.converter is None:
            return {unit.names[0]: next(iter(tensors.values()))}
        template, name, patterns = unit.converter
        converter = deepcopy(template)
        for key, tensor in tensors.items():
            converter.add_tensor(name, key, patterns[key], tensor)
        values = converter.convert(name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def _revert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        # As transformers keeps them on a model that it has loaded; its way back reads them there.
        self.model._weight_conversions = [transform for transform in self._transforms if transform.was_used()]
        back: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(tensors))
        return back

    def samples(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        """Return what `base_digest` looks at of every tensor of the model, by name, rounded to `dtypes`, as fp32.

        Of a tensor that lies in the checkpoint as it is, nothing else is read.
        """
        found = {}
        for unit in self.units:
            if unit.converter is None:
                entry, name = next(iter(unit.entries.values())), unit.names[0]
                found[name] = sample_every(entry.num, entry.every).to(dtypes[name]).float()
            else:
                found |= {name: sample_of(tensor) for name, tensor in self.read(unit, dtypes).items()}
        return found

    def in_order(self, samples: Mapping[str, torch.Tensor]) -> list[Sample]:
        """Return the samples of the model's parameters as `digest_of_samples` wants them; tied ones come once."""
        ordered = []
        for name, parameter in self.model.named_parameters():
            there = next(n for n in self.tied.get(name, [name]) if n in samples)
            ordered.append((name, tuple(parameter.shape), samples[there]))
        return ordered

    def names_of(self, path: str) -> list[str]:
        """Return the names under which the checkpoint holds the model's tensor `path`."""
        return [name for name in self.tied.get(path, [path]) if name in self.by_name]


def dtypes_on_load(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor of a model on the meta device has after loading, whatever its file holds."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(model.dtype)
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if plan:
        kept, groups, _ = build_glob_alternation(list(plan))
        for name in found:
            match = kept.search(name)
            if match is not None:
                found[name] = plan[groups[match.lastgroup]]
    return found


def _tied(model: PreTrainedModel) -> dict[str, list[str]]:
    """For each name of a tensor that has several: all of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: several for several in names.values() if len(several) > 1 for name in several}


def _equal(one: Unit, other: Unit) -> bool:
    """Whether two units hold the same tensor, read in blocks."""
    if one.converter is not None or other.converter is not None:
        return False
    a, b = (next(iter(unit.entries.values())) for unit in (one, other))
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(torch.equal(x, y) for x, y in zip(a.blocks(), b.blocks(), strict=True))


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")
