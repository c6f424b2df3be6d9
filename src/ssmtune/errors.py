"""Every error a user can meet: one sentence that says what, where, the value found, what was expected, and the next step.

Facts that a caller may want to act on are attributes.
The command line prints the message without a traceback and exits with 2 (`CheckFailed`: 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SsmtuneError(Exception):
    """Base of everything that ssmtune raises on purpose."""


class ConfigError(SsmtuneError):
    """A file, option or field holds something that cannot be used."""


class DataError(SsmtuneError):
    """Training or evaluation data is malformed; the message names file and line."""


class UnsupportedModel(SsmtuneError):
    """The model's architecture, or one attribute of its config, is not known to any family."""


class PlacementError(SsmtuneError):
    """A recipe or pattern selects nothing, or selects a site that cannot be edited as asked."""


class PlanMismatch(SsmtuneError):
    """A plan was made for another model than the one it is attached to."""


class AttachError(SsmtuneError):
    """A model is in a state that a plan cannot be attached to or detached from."""


class AdapterMismatch(SsmtuneError):
    """The files of an adapter directory do not belong together, or not to this base model."""


class CheckFailed(SsmtuneError):
    """A check of `verify` or `doctor` failed."""


class TrainingFailed(SsmtuneError):
    """Training stopped early: non-finite loss or gradients, or nowhere left to write."""


class MissingDependency(SsmtuneError):
    """An optional package is not installed; the message holds the exact install command."""


class RecordError(SsmtuneError):
    """A record is missing, truncated, or of another kind than the one expected."""


def nearest(name: str, known: Iterable[str], *, num: int = 3) -> str:
    """Return a phrase naming the entries of `known` closest to `name`, or all of them when none is close.

    >>> nearest("all+cor", ["all", "all+core", "mlp"])
    "nearest: 'all+core', 'all'"
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=num, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(repr(c) for c in close)
    return "known: " + ", ".join(repr(c) for c in names)
