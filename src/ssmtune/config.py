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
    if path.suffix == ".json":
        return parse_json(text, where=str(path))
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}).") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}; expected a mapping at the top level.")
    return data


def read_json(path: Path, *, infinite: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file of somebody else's. Raises `ConfigError` as `parse_json` does, or unreadable."""
    try:
        return parse_json(path.read_text(encoding="utf-8"), where=str(path), infinite=infinite)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8 ({error.reason}). Copy the file again.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Check the path, or copy the file again."
        ) from None


def parse_json(text: str, *, where: str, infinite: bool = False) -> dict[str, Any]:
    """Return the JSON object in `text`; `where` names it in errors.

    Raises `ConfigError` for what is no JSON object, for a key that is given twice and for NaN and infinities, which are
    no JSON although Python's reader takes them. `infinite`: take them (a model's config may hold `time_step_limit`).
    """
    try:
        value = loads_strictly(text, infinite=infinite)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}, line {error.lineno}: not valid JSON ({error.msg}). The file may be truncated."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({error}). Correct it, or copy the file again.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: got {type(value).__name__}; expected a mapping at the top level.")
    return value


def loads_strictly(text: str, *, infinite: bool = False) -> Any:
    """Return the value of a JSON text. Raises `ValueError` also for a key given twice, and NaN unless `infinite`."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=float if infinite else _refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
