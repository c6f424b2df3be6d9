"""Several adapters on one base: one is in use at a time, and disjoint ones can be composed into one more."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune import adapter_files
from ssmtune.adapter_files import SavedAdapter
from ssmtune.attach import AdaptedModel, attach_saved, refuse_adapted
from ssmtune.errors import AttachError, ConfigError, PlacementError, nearest
from ssmtune.families.base import find_family
from ssmtune.placement import touches
from ssmtune.plan import refuse_mixture
from ssmtune.virtual_tokens import backbone_of, holds_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAMP = "_ssmtune_filled_by"
"""Attribute of a cache that says under which adapter of which set it was filled; it is copied with the cache."""

_numbers = itertools.count()


class AdapterSet:
    """The adapters of one base model, each with everything that was trained: factors, core, states, branches, prompts.

    `model` is the base, in evaluation mode; it is called as before and computes with the adapter that is in use, bit for
    bit as `ssmtune.load` would give it, and as itself where none is. A cache is continued only under the adapter that
    filled it. `release` ends this.

    >>> adapters = AdapterSet(model)                             # doctest: +SKIP
    >>> adapters.add("sql", "runs/sql/adapter")                  # doctest: +SKIP
    >>> adapters.use("sql")                                      # doctest: +SKIP
    >>> model.generate(**inputs)                                 # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises `AttachError` for a model that carries adapters already."""
        refuse_adapted(model)
        self.model = model
        self._training = model.training
        model.eval()
        self._saved: dict[str, SavedAdapter] = {}
        self._on: AdaptedModel | None = None
        self._name: str | None = None
        self._number = next(_numbers)
        family = find_family(model.config.model_type)[1]
        self._cache_name = family.cache
        backbone = model.get_submodule(backbone_of(model, family))
        self._handles = [
            backbone.register_forward_pre_hook(self._refuse_stale, with_kwargs=True, prepend=True),
            backbone.register_forward_hook(self._stamp_output),
        ]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._saved)

    @property
    def in_use(self) -> str | None:
        """The adapter that the model computes with; None for the base alone."""
        return self._name

    def add(self, name: str, directory: str | Path) -> None:
        """Read an adapter directory into memory; later changes of its files do not matter.

        It is put on once, so that what does not fit is said here; then what was in use is in use again.
        Raises `ConfigError` for a name that is taken, `AdapterMismatch` and the like as `ssmtune.load` does.
        """
        self._try(name, adapter_files.read(Path(directory)))

    def compose(self, names: Sequence[str], name: str | None = None) -> str:
        """Add the adapter that makes the edits of all `names`, and return its name, "a+b" where none is given.

        Raises `PlacementError` naming the first site that two of them edit; see `add`.
        """
        if len(set(names)) != len(names) or len(names) < 2:
            raise ConfigError(f"compose {list(names)}: expected the names of two or more different adapters.")
        composed = "+".join(names) if name is None else name
        self._try(composed, _compose({part: self._find(part) for part in names}))
        return composed

    def use(self, name: str | None) -> None:
        """Let the model compute with adapter `name`, None for the base alone.

        The adapter before is taken off, which leaves the base bitwise as it was. When putting on the next one fails, the
        base alone is in use. Raises `ConfigError` naming the nearest for an unknown name.
        """
        self._refuse_released()
        saved = None if name is None else self._find(name)
        if name == self._name:
            return
        self._take_off()
        if saved is not None:
            self._on = attach_saved(self.model, saved)
            self._name = name

    def release(self) -> PreTrainedModel:
        """Return the base without adapters, checks of caches and evaluation mode; the set is used up."""
        self._refuse_released()
        self._take_off()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self.model.train(self._training)

    def _try(self, name: str, saved: SavedAdapter) -> None:
        self._refuse_released()
        if name in self._saved:
            raise ConfigError(f"adapter {name!r}: there is one of this name. Choose another name.")
        before = self._name
        self._take_off()
        try:
            attach_saved(self.model, saved).detach()
        finally:
            self.use(before)
        self._saved[name] = saved

    def _take_off(self) -> None:
        on, self._on, self._name = self._on, None, None
        if on is not None:
            on.detach()

    def _find(self, name: str) -> SavedAdapter:
        if name not in self._saved:
            raise ConfigError(f"adapter {name!r}: not in this set; {nearest(name, self._saved)}. Add it first.")
        return self._saved[name]

    def _refuse_released(self) -> None:
        if not self._handles:
            raise AttachError("this set of adapters was released before. Make another: AdapterSet(model).")

    def _refuse_stale(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse to continue a cache that was not filled under the adapter in use; an empty one is marked as its own."""
        cache = kwargs.get(self._cache_name)
        if cache is None:
            return
        if _is_empty(cache):
            setattr(_carrier(cache), STAMP, (self._number, self._name))
            return
        stamp: tuple[int, str | None] | None = getattr(_carrier(cache), STAMP, None)
        if stamp != (self._number, self._name):
            filled = "outside of this set of adapters"
            if stamp is not None and stamp[0] == self._number:
                filled = f"under {_called(stamp[1])}"
            raise AttachError(
                f"the cache was filled {filled}, and {_called(self._name)} is in use: its states are not those that "
                "this model would have come to. Fill it again from the first token."
            )

    def _stamp_output(self, _: Any, args: Any, output: Any) -> None:
        cache = output.get(self._cache_name) if hasattr(output, "get") else None
        if cache is not None:
            setattr(_carrier(cache), STAMP, (self._number, self._name))


def _compose(parts: dict[str, SavedAdapter]) -> SavedAdapter:
    """One adapter with the edits of all `parts`."""
    (first_name, first), *others = parts.items()
    sites = [(first_name, site) for site in first.plan.sites]
    for name, saved in others:
        for site in saved.plan.sites:
            for other_name, other in sites:
                if other.path == site.path and touches(other.rows, site.rows):
                    raise PlacementError(
                        f"{site.key}: edited by adapter {other_name!r} ({other.role}, method {other.method!r}) and by "
                        f"{name!r} ({site.role}, method {site.method!r}). Only adapters without a common site compose; use "
                        "one of them, or train one adapter for both."
                    )
        sites += [(name, site) for site in saved.plan.sites]
    together = [site for _, site in sites]
    refuse_mixture(together)
    members = list(parts.values())
    return SavedAdapter(
        directory=first.directory,
        plan=replace(first.plan, recipe=" + ".join(m.plan.recipe for m in members), sites=tuple(together), budget=None),
        base_digest=first.base_digest,
        run_id="+".join(m.run_id for m in members),
        step=first.step,
        discarded=frozenset().union(*(m.discarded for m in members)),
        peft_tensors={key: tensor for m in members for key, tensor in m.peft_tensors.items()},
        our_tensors={key: tensor for m in members for key, tensor in m.our_tensors.items()},
    )


def _carrier(cache: Any) -> Any:
    """What the mark of a cache is put on: itself, or the first tensor of a list, which takes no attributes."""
    return cache[0] if isinstance(cache, (list, tuple)) else cache


def _is_empty(cache: Any) -> bool:
    """Whether nothing was put into a cache yet; a list of states begins as zeros."""
    if isinstance(cache, (list, tuple)):
        return not bool(cache[0].any())
    if hasattr(cache, "layers"):
        return not holds_text(cache)
    return getattr(cache, "seqlen_offset", 1) == 0


def _called(name: str | None) -> str:
    return "the base alone" if name is None else f"adapter {name!r}"
