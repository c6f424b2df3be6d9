"""What a method file states, and how it is found.

A method knows roles and shapes, never architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ssmtune.discovery import load_constant, module_names
from ssmtune.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

Kind = Literal["module", "tensor"]


class TensorEdit(Protocol):
    """A trained edit of one tensor: a module that maps the tensor to its effective value.

    The same call serves training, verification and merging.
    `enabled` switches it off without removing it.
    """

    enabled: bool

    def __call__(self, weight: torch.Tensor) -> torch.Tensor: ...

    def trained(self) -> torch.nn.Parameter:
        """The one parameter that trains."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Everything ssmtune knows of one method.

    kind "module": PEFT's own layer around a module that every path calls.
    kind "tensor": `make_edit(weight, options)` returns a module that computes the effective tensor.
    """

    kind: Kind
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
    allowed_roles: frozenset[str]
    num_params: Callable[[Sequence[int], Any], int]
    """(shape of the site, options) -> trained parameters, exactly."""
    optimizer_group: Literal["lora", "core"]
    make_edit: Callable[[torch.Tensor, Any], torch.nn.Module] | None = None
    value_kind: Literal["factors", "delta", "absolute"] = "factors"


def method_names() -> tuple[str, ...]:
    """Names of all methods: the files beside this one."""
    return module_names("ssmtune.methods")


def get_method(name: str) -> Method:
    """Return the method in the file `name`. Raises `ConfigError` naming the nearest."""
    if name not in method_names():
        raise ConfigError(f"method {name!r} does not exist; {nearest(name, method_names())}.")
    return load_constant("ssmtune.methods", name, "METHOD", Method)
