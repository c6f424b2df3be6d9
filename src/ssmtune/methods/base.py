"""What a method file states, and how it is found.

A method knows roles and shapes, never architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import pydantic

from ssmtune.config import STRICT
from ssmtune.discovery import load_constant, module_names
from ssmtune.errors import ConfigError, nearest
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch

    from ssmtune.component import Component

Rows = Sequence[tuple[int, int]] | None
Container = Literal["module", "tensor", "state", "branch"]
"""What holds a trained edit: PEFT's layer around a module, an edit of the tensor itself, an addition to a recurrence, or
a module beside a block."""


class TensorEdit(Protocol):
    """A trained edit of one tensor: a module that maps the tensor to its effective value.

    The same call serves training, verification and merging.
    `enabled` switches it off without removing it.
    """

    enabled: bool

    def __call__(self, weight: torch.Tensor) -> torch.Tensor: ...

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What trains, by name; the name is empty where it is one tensor of the base's own shape."""

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the edit needs besides, by name: it is saved with what trains."""


@runtime_checkable
class Scheduled(TensorEdit, Protocol):
    """An edit that takes part in its training: by a penalty, and by what it decides after each optimiser step."""

    def penalty(self) -> torch.Tensor:
        """What it adds to the training loss (the mean over all such edits is added), a scalar."""

    def progress(self) -> frozenset[str]:
        """Names of the buffers that only a continuation of the training needs: checkpoints have them, adapters do not."""

    @staticmethod
    def after_step(edits: Sequence[Any], step: int, num_steps: int) -> None:
        """What edits of equal options decide together after optimiser step `step` of `num_steps`, counted from 1."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class NoOptions:
    """Nothing to choose."""


def num_elements(shape: Sequence[int], options: object) -> int:
    """Every element trains."""
    return math.prod(shape)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Everything ssmtune knows of one method.

    `in_module`: whether PEFT's own layer can hold it around a module that every path calls.
    `make_edit(weight, rows, options)` returns a module that computes the effective tensor, for all other sites;
    `rows` are the [first, end) ranges that the edit is confined to, None for all.
    `make_state(shape, options)` returns a module without inputs that computes an addition to a recurrence.
    `make_branch(shape, options)` returns a module that computes what a block's output is increased by from the block's
    input and what the call was given beside it (`methods/_branch.py`); `shape` is the width of the model.
    """

    in_module: bool
    summary: str
    """What it trains, in one sentence."""
    formula: str
    """Number of trained parameters per site, as a formula in the site's shape."""
    source: str
    mergeable: bool
    overhead: str
    """Cost at inference once merged, or always where it cannot merge."""
    Options: type[Any]
    """Dataclass of the method's options; every field has a default."""
    allows: Callable[[Component], bool]
    """Whether the method can edit a component."""
    num_params: Callable[[Sequence[int], Any], int]
    """(shape of the site, options) -> trained parameters, exactly."""
    optimizer_group: Literal["lora", "core", "state"]
    """Which learning rate and clipping it has (`train.OptimizerConfig`)."""
    make_edit: Callable[[torch.Tensor, Rows, Any], torch.nn.Module] | None = None
    make_state: Callable[[Sequence[int], Any], torch.nn.Module] | None = None
    make_branch: Callable[[Sequence[int], Any], torch.nn.Module] | None = None
    at_every_token: str = ""
    """What it does at every token that neither a tensor, a start nor a larger state of a plain model can hold; as said of
    its name. Empty where one of them can."""
    starts_as_base: bool = True
    """Whether a model to which it has just been attached computes what its base computes, bit for bit."""
    waits: tuple[str, ...] = ()
    """Parts of the names of trained tensors that have no gradient at first: a factor that starts at zero multiplies them."""
    acts_at_start: bool = False
    """Whether it acts where a sequence begins, and on later steps through the cache alone."""
    needs: str = ""
    """What a model must have for it, where that is not plain from the role; said when it has nothing to edit."""
    at: Callable[[Component, Any], Any] | None = None
    """(component, options) -> the options as they hold there, for methods that do not treat every role alike."""
    value_kind: Literal["factors", "composed", "delta", "absolute", "sparse"] = "factors"
    """"factors": the change is a scaled product B A. "composed": a product and more, which no pair of factors can hold."""
    size_option: str = ""
    """Name of the integer option that `num_params` grows with; empty where a site's size is fixed."""
    refuses: Callable[[Sequence[int], Any], str] = lambda shape, options: ""
    """(shape of the site, options) -> why these options cannot edit such a site, or the empty string."""
    needs_tensor: Callable[[Sequence[int], Any], bool] = lambda shape, options: False
    """Whether a site is edited as a tensor although a module of PEFT's could be put around it."""
    peft_switches: Mapping[str, Any] = field(default_factory=dict)
    """Fields of PEFT's config that the method sets for the adapter as a whole."""
    decay_factor: Callable[[str, str, Any], float] | None = None
    """(role of the site, name of the trained tensor within it, options) -> multiple of the optimiser's weight decay.

    None is 1 in the optimiser group "lora" and 0 in the others."""
    recipes: Mapping[str, tuple[Edit, ...]] = field(default_factory=dict)
    """Recipes that this method brings, by name."""


def method_names() -> tuple[str, ...]:
    """Names of all methods: the files beside this one."""
    return module_names("ssmtune.methods")


def get_method(name: str) -> Method:
    """Return the method in the file `name`. Raises `ConfigError` naming the nearest."""
    if name not in method_names():
        raise ConfigError(f"method {name!r} does not exist; {nearest(name, method_names())}.")
    return load_constant("ssmtune.methods", name, "METHOD", Method)
