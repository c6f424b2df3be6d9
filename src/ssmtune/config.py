"""Strict decoding of YAML and JSON into frozen dataclasses, with errors that name the path and the nearest known key."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ssmtune.errors import ConfigError, nearest

T = TypeVar("T")

STRICT = pydantic.ConfigDict(extra="forbid", strict=False, arbitrary_types_allowed=False)
"""pydantic settings of every config dataclass: an unknown key is an error."""


def decode(cls: type[T], data: Any, *, where: str) -> T:
    """Return `data` as an instance of the pydantic dataclass `cls`.

    `where` names the source (a file name, "the command line") in the error.
    Raises `ConfigError` naming the dotted path of the first bad field, the value found and what was expected.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: got {type(data).__name__}; expected a mapping of fields for {cls.__name__}.")
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(data))
    except pydantic.ValidationError as error:
        raise ConfigError(f"{where}: {_describe(error, cls)}") from None


def _describe(error: pydantic.ValidationError, cls: Any) -> str:
    first = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields_at(cls, first["loc"][:-1])
        return f"unknown field '{path}'; {nearest(str(first['loc'][-1]), known)}. Remove it or correct its name."
    if first["type"] in ("missing", "missing_argument"):
        return f"field '{path}' is missing. Add it: it has no default."
    return f"field '{path}': got {first.get('input')!r}; {first['msg'][0].lower()}{first['msg'][1:]}."


def _fields_at(cls: Any, path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the dataclass that sits at `path` below `cls`; those of `cls` when the path leaves dataclasses."""
    here = cls
    for part in path:
        hints = typing.get_type_hints(here) if dataclasses.is_dataclass(here) else {}
        candidates = [hints.get(str(part)), *typing.get_args(hints.get(str(part)))]
        here = next((c for c in candidates if dataclasses.is_dataclass(c)), here)
    return [f.name for f in dataclasses.fields(here)]


def load_yaml(cls: type[T], path: Path | str) -> T:
    """Read a YAML (or JSON) file and decode it strictly as `cls`. Raises `ConfigError` naming file, line and field."""
    return decode(cls, read_mapping(path), where=str(path))


def read_mapping(path: Path | str) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping. Raises `ConfigError` naming the file, and the line of a syntax error."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}). The file may be truncated."
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}; expected a mapping at the top level.")
    return data
