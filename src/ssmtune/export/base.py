"""What a target of `export` states, and how it is found.

A target is one file beside this one that holds a constant `TARGET`; its name is the file's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.discovery import load_constant, module_names
from ssmtune.errors import ConfigError, nearest
from ssmtune.methods.base import get_method
from ssmtune.models import Dtype

if TYPE_CHECKING:
    from ssmtune.plan import Site

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m"]

PROMPTS = (
    "Answer with one word: is the following sentence a question or a statement? The river rose in the night.",
    '{"name": "order", "fields": [{"name": "id", "type": "integer"}, {"name": "customer", "type": "string"}]}',
    "The state of a recurrent layer is all that it keeps of the text so far; attention keeps every token instead. " * 3,
    "def area(width: float, height: float) -> float:\n    return width * height\n\nprint(area(3.5, 12))",
)
"""Texts that an exported model must continue as the model in memory does, where nobody names better ones."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportConfig:
    """What to export, for whom, and where to."""

    run: str
    """A run directory, or an adapter directory."""
    to: str
    out: str
    model: str | None = None
    """The base model; None for the one that the adapter was trained on."""
    type: GgufType | None = None
    dtype: Dtype | None = None
    drop_extras: bool = False
    bake_extras: str | None = None

    @property
    def chosen(self) -> frozenset[str]:
        """The options that only some targets read, as far as they were given."""
        given = {
            "type": self.type,
            "dtype": self.dtype,
            "drop_extras": self.drop_extras,
            "bake_extras": self.bake_extras,
        }
        return frozenset(name for name, value in given.items() if value not in (None, False))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A consumer of what was trained: what is written for it, and what is proven before it is there."""

    writes: str
    proves: str
    options: frozenset[str]
    """Which of `ExportConfig.chosen` it reads; the others are refused."""
    run: Callable[[ExportConfig], dict[str, Any]]
    """Writes the result and returns the facts of the record, among them `files` and `record_path`."""


NOT_TARGETS = frozenset(
    """
    agreement base cache_start config_words converter engine_gaps engines factors judgement magnitudes plain tensor_types
    """.split()
)


def target_names() -> tuple[str, ...]:
    """Names of all targets: the files beside this one."""
    return module_names("ssmtune.export", NOT_TARGETS)


def get_target(name: str) -> Target:
    """Return the target in the file `name`. Raises `ConfigError` naming the nearest."""
    if name not in target_names():
        raise ConfigError(f"--to {name!r}: no such target; {nearest(name, target_names())}.")
    return load_constant("ssmtune.export", name, "TARGET", Target)


def refuse_existing(out: Path) -> None:
    """Raise `ConfigError` when `out` exists: nothing is overwritten."""
    if out.exists():
        raise ConfigError(f"{out}: exists already. Choose another place for the export, or delete it.")


def refuse_unmergeable(sites: Iterable[Site]) -> None:
    """Raise `ConfigError` naming the sites whose method no weight can hold."""
    held = [site for site in sites if not get_method(site.method).mergeable]
    if held:
        methods = sorted({site.method for site in held})
        # What a cache or a larger state can hold has no reason of its own.
        plain = not any(get_method(name).at_every_token for name in methods)
        raise ConfigError(
            f"{len(held)} sites ({', '.join(sorted({site.role for site in held}))}) are trained by "
            f"{', '.join(map(repr, methods))}, which no tensor of the base can hold: "
            f"{get_method(methods[0]).at_every_token or get_method(methods[0]).overhead}. "
            f"{'Use --to hf, or serve' if plain else 'Serve'} this adapter with ssmtune.load, or train it again with a method "
            "that merges."
        )
