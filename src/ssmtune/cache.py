"""A cache of what is slow to make and always the same: generated examples and packed rows. Deleting it loses nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmtune.records import digest


def cache_dir() -> Path:
    """Where the cache lives: `$XDG_CACHE_HOME/ssmtune`, by default `~/.cache/ssmtune`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ssmtune"


def cached_directory(key: Any, make: Callable[[Path], None]) -> Path:
    """Return the directory cached under `key` (plain data); `make(path)` fills it when it is not there yet.

    Two processes that make the same entry at once do not disturb each other: each fills a directory of its own and the
    first rename wins.
    """
    target = cache_dir() / digest(key)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        make(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target
