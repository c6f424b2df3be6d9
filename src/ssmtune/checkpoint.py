"""Files of tensors (safetensors): read one tensor at a time, never trusting the header; written the same way.

Layout: 8 bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, [first, end) bytes), data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeGuard

from ssmtune.config import parse_json, read_json
from ssmtune.errors import ConfigError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
BLOCK_BYTES = 1 << 22
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.\- ]{0,200}")
"""Names that a file of an index or adapter may have: no path, nothing hidden."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""The format's names of dtypes, and torch's."""
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of one element; 1 for the others."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    num_bytes: int

    @property
    def num(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    def read(self) -> torch.Tensor:
        """Return the tensor, read into memory of its own."""
        import torch

        flat = torch.empty(self.num, dtype=self.torch_dtype)
        data, done = _bytes_of(flat), 0
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.first)
            while done < self.num_bytes:
                got = stream.readinto(data[done : done + BLOCK_BYTES])
                if not got:
                    raise ConfigError(f"{self.file}: became shorter while it was read. Copy it again.")
                done += got
        return flat.view(self.shape)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the tensor's elements in order, [n] each, at most `BLOCK_BYTES` at a time."""
        step = BLOCK_BYTES // ITEM_BYTES.get(self.dtype, 1)
        for start in range(0, self.num, step):
            yield self.part(start, min(step, self.num - start)).read()

    def part(self, start: int, num: int) -> Entry:
        """Return `num` elements of the flat tensor from `start` on, as an entry of their own, [num]."""
        size = ITEM_BYTES.get(self.dtype, 1)
        return Entry(
            file=self.file, dtype=self.dtype, shape=(num,), first=self.first + start * size, num_bytes=num * size
        )

    def every(self, stride: int, limit: int) -> torch.Tensor:
        """Return elements 0, stride, 2 stride, ... of the flat tensor, at most `limit`, read without the others."""
        import torch

        size = ITEM_BYTES.get(self.dtype, 1)
        positions = range(0, self.num, stride)[:limit]
        with self.file.open("rb", buffering=0) as stream:
            data = b"".join(os.pread(stream.fileno(), size, self.first + i * size) for i in positions)
        return torch.frombuffer(bytearray(data), dtype=self.torch_dtype) if data else torch.empty(0)


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional tensor itself."""
    import torch

    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def read_header(path: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, by name; its data is not read and nothing is allocated for it.

    Raises `ConfigError` for a header that is malformed or contradicts the file: an unknown dtype, a shape that does not
    fit its bytes, tensors that overlap, leave gaps or reach beyond the end.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ConfigError(
                    f"{path}: its header should have {length:,} bytes, the file has {size:,}. It is truncated or no "
                    "safetensors file; copy it again."
                )
            header = parse_json(stream.read(length).decode("utf-8", "replace"), where=f"{path}, header")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Check the path, or copy the file again."
        ) from None
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, facts, 8 + length) for name, facts in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].num_bytes)):
        if entry.first != end:
            what = "overlaps another tensor" if entry.first < end else "leaves a gap before it"
            raise ConfigError(
                f"{path}: tensor {name!r} {what} (byte {entry.first}, expected {end}). The file is damaged."
            )
        end += entry.num_bytes
    if end != size:
        raise ConfigError(f"{path}: its tensors end at byte {end:,}, the file has {size:,}. Copy it again.")
    return entries


def _entry(path: Path, name: str, facts: Any, start: int) -> Entry:
    shape = facts.get("shape") if isinstance(facts, dict) else None
    offsets = facts.get("data_offsets") if isinstance(facts, dict) else None
    if not (
        _counts(shape) and _counts(offsets) and len(offsets) == 2 and set(facts) == {"dtype", "shape", "data_offsets"}
    ):
        raise ConfigError(
            f"{path}: the header's entry of {name!r} is malformed ({str(facts)[:80]}). The file is damaged."
        )
    dtype = facts["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"{path}: tensor {name!r} has dtype {str(dtype)[:20]!r}; known are {', '.join(DTYPES)}.")
    expected = math.prod(shape) * ITEM_BYTES.get(dtype, 1)
    if offsets[1] - offsets[0] != expected:
        raise ConfigError(
            f"{path}: tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {expected:,} bytes, the header "
            f"gives it {offsets[1] - offsets[0]:,}. The file is damaged."
        )
    return Entry(file=path, dtype=dtype, shape=tuple(shape), first=start + offsets[0], num_bytes=expected)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers from 0 (no booleans, no fractions)."""
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def read_checkpoint(directory: Path) -> dict[str, Entry]:
    """Return the tensors of a model directory by name: of `model.safetensors`, or of the files that its index names.

    Raises `ConfigError` for files that are missing, malformed or outside of the directory, and for an index that
    contradicts them.
    """
    # In this order, as transformers looks for them.
    if (directory / WEIGHTS).exists() or not (directory / INDEX).is_file():
        return read_header(inside(directory, WEIGHTS))
    index = directory / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ConfigError(f"{index}: has no 'weight_map' from tensor names to file names. Copy it again.")
    entries: dict[str, Entry] = {}
    for file in sorted(set(placed.values())):
        found = read_header(inside(directory, file))
        absent = sorted({name for name, place in placed.items() if place == file} - set(found))
        twice = sorted(set(entries) & set(found))
        if absent or twice:
            what = (
                f"{absent[0]!r} is not in it, where {INDEX} has it"
                if absent
                else f"{twice[0]!r} is in another file too"
            )
            raise ConfigError(f"{directory / file}: {what}. The files are not of one model; copy it again.")
        entries |= found
    return entries


def inside(directory: Path, name: str) -> Path:
    """Return the path of the file `name` in `directory`.

    Raises `ConfigError` for a name that leads elsewhere, itself or through a link. A hub's cache links from snapshots to
    blobs beside them, which is allowed.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise ConfigError(f"{directory}: names the file {name[:80]!r}; expected the plain name of a file beside it.")
    path = directory / name
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ConfigError(f"{path}: cannot be followed ({error}). Copy the file itself.") from None
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if target.parent not in allowed:
        raise ConfigError(f"{path}: is a link out of the directory, which is not followed. Copy the file itself.")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. The directory is incomplete; copy it again.")
    return path


class ShardWriter:
    """Writes tensors whose names, dtypes and shapes are known before their values, into files of bounded size.

    `write` may come in any order, in parts, and from several threads. `finish` flushes the files and raises when a byte
    is missing.
    """

    def __init__(self, directory: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, max_bytes: int) -> None:
        shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
        taken = 0
        for name, (dtype, shape) in tensors.items():
            num_bytes = math.prod(shape) * ITEM_BYTES.get(dtype, 1)
            if shards[-1] and taken + num_bytes > max_bytes:
                shards.append({})
                taken = 0
            shards[-1][name] = (dtype, shape)
            taken += num_bytes
        width = f"-of-{len(shards):05d}"
        self.files = (
            [WEIGHTS] if len(shards) == 1 else [f"model-{i + 1:05d}{width}.safetensors" for i in range(len(shards))]
        )
        self.num_bytes = 0
        self._streams: dict[str, FileIO] = {}
        self._places: dict[str, tuple[str, int, int]] = {}
        self._left: dict[str, int] = {}
        self._counting = Lock()
        for file, shard in zip(self.files, shards, strict=True):
            self._open(directory / file, file, shard)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": self.num_bytes},
                "weight_map": {n: p[0] for n, p in self._places.items()},
            }
            (directory / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")

    def _open(self, path: Path, file: str, shard: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        first = 0
        # The widest first, as others write them: then every tensor lies at a multiple of its element's size.
        for name, (dtype, shape) in sorted(shard.items(), key=lambda item: -ITEM_BYTES.get(item[1][0], 1)):
            num_bytes = math.prod(shape) * ITEM_BYTES.get(dtype, 1)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, first + num_bytes]}
            first += num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._streams[file] = path.open("xb", buffering=0)
        self._write_at(file, len(text).to_bytes(8, "little") + text, 0)
        for name in shard:
            begin, end = header[name]["data_offsets"]
            self._places[name] = (file, 8 + len(text) + begin, end - begin)
            self._left[name] = end - begin
        self.num_bytes += first

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write `values` (already in the tensor's dtype) as the elements of the tensor `name` from `start` on, once each."""
        file, first, num_bytes = self._places[name]
        data, offset = _bytes_of(values.detach().contiguous().reshape(-1)), start * values.element_size()
        assert offset + len(data) <= num_bytes, name
        self._write_at(file, data, first + offset)
        with self._counting:
            self._left[name] -= len(data)

    def _write_at(self, file: str, data: bytes | memoryview, position: int) -> None:
        stream = self._streams[file]
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(stream.fileno(), data[done:], position + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, stream.name) from None

    def finish(self) -> None:
        """Flush every file to the disk and close it."""
        missing = [name for name, left in self._left.items() if left]
        assert not missing, f"not written: {missing[:3]}"
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        self.close()

    def close(self) -> None:
        """Close the files, whole or not."""
        for stream in self._streams.values():
            stream.close()
