"""Find the extensions of a folder by their file names: no registry, no decorator, no work on import."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Set
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")

NOT_EXTENSIONS = frozenset({"base"})


@lru_cache
def module_names(package: str, without: Set[str] = NOT_EXTENSIONS) -> tuple[str, ...]:
    """Return the sorted names of the modules in `package`, without those in `without` and those that start with "_"."""
    path = importlib.import_module(package).__path__
    names = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in names if name not in without and not name.startswith("_")))


def load_constant(package: str, name: str, constant: str, kind: type[T]) -> T:
    """Return the constant of that name, an instance of `kind`, from module `name` of `package`."""
    value = vars(importlib.import_module(f"{package}.{name}"))[constant]
    assert isinstance(value, kind), f"{package}.{name}.{constant} is no {kind.__name__}"
    return value
