"""What a check of `verify` states, and how it is found.

A check is one file beside this one that holds a constant `CHECK`; its name is the file's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmtune.discovery import load_constant, module_names
from ssmtune.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from ssmtune.attach import AdaptedModel

NOT_CHECKS = frozenset({"base", "child", "forward", "fresh"})


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found.

    `measured` is the worst value, `limit` what it is compared with, `where` the tensor, path or position it belongs
    to (empty where nothing stands out), `detail` one or two sentences for a reader.
    """

    name: str
    ok: bool
    measured: float
    limit: float
    where: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a value that JSON cannot hold is written as text."""
        numbers = {key: _plain(value) for key, value in (("measured", self.measured), ("limit", self.limit))}
        return {"name": self.name, "ok": self.ok, **numbers, "where": self.where, "detail": self.detail}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CheckResult:
        """Read a result back."""
        numbers = {key: float(data[key]) for key in ("measured", "limit")}
        return cls(name=data["name"], ok=data["ok"], where=data["where"], detail=data["detail"], **numbers)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is verified: the adapted model in memory, what was saved of it, and where its base comes from."""

    adapted: AdaptedModel
    documents: tuple[torch.Tensor, ...]
    """Token ids, int64 [T] each; the first is long enough to cross a chunk of the scan, all have odd lengths."""
    directory: Path
    """The saved adapter: the run's, or one written for this verification."""
    scratch: Path
    """A folder that is deleted afterwards."""
    run_dir: Path | None = None
    base_name: str | None = None
    """What `load_model` takes to load the same base weights again; None for a model that exists in memory only."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A property, and how it is tested. `needs_run`: it looks at files that only a run directory has."""

    proves: str
    run: Callable[[Subject], CheckResult]
    needs_run: bool = False


def check_names() -> tuple[str, ...]:
    """Names of all checks: the files beside this one."""
    return module_names("ssmtune.verify", NOT_CHECKS)


def get_check(name: str) -> Check:
    """Return the check in the file `name`. Raises `ConfigError` naming the nearest."""
    if name not in check_names():
        raise ConfigError(f"check {name!r} does not exist; {nearest(name, check_names())}.")
    return load_constant("ssmtune.verify", name, "CHECK", Check)
