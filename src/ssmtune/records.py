"""Records: one JSON file per run, evaluation, verification or study, written atomically, with what is needed to trust it."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from ssmtune.config import loads_strictly
from ssmtune.errors import RecordError

Status = Literal["done", "failed", "aborted", "provisional"]
Kind = Literal[
    "pretrain",
    "train",
    "verify",
    "evaluate",
    "study",
    "study_cell",
    "study_tuning",
    "demo",
    "benchmark",
    "export",
    "synthetic",
]

STAMP = "COMMIT"
"""Beside this file, in a copy made without version control: the commit it was made from."""

MAX_RECORD_BYTES = 1 << 28
"""A file that unpacks to more is no record: a study of thousands of runs takes a tenth of it."""

PACKAGES = (
    "ssmtune",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "triton",
    "bitsandbytes",
)


def environment() -> dict[str, Any]:
    """Return package versions, Python, platform, device and commit: what a reader needs to judge a figure.

    `commit` is None outside a git checkout; `dirty` says whether tracked files differed from it; `code` is a digest of
    the package's sources as they are, whatever version control says.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _git_state()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "device": _device(),
        "commit": commit,
        "dirty": dirty,
        "code": code_digest(),
    }


def new_record(kind: Kind, *, config: Mapping[str, Any], status: Status = "done", **facts: Any) -> dict[str, Any]:
    """Return a record: kind, creation time, status, config, environment and the given facts, ready for `write_json`."""
    return {
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "status": status,
        "config": dict(config),
        "environment": environment(),
        **facts,
    }


def digest(value: Any) -> str:
    """Return 16 hex digits of the sha256 of `value` as canonical JSON: equal configs have equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path | str) -> str:
    """Return the hex sha256 of a file's bytes."""
    value = hashlib.sha256()
    with Path(path).open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            value.update(block)
    return value.hexdigest()


def write_json(path: Path | str, value: Any) -> Path:
    """Write `value` as JSON (gzip when the name ends in .gz) so that readers see the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()
    if path.suffix == ".gz":
        # A fixed time stamp keeps equal records byte-identical.
        payload = gzip.compress(payload, mtime=0)
    write_bytes(path, payload)
    return path


def write_bytes(path: Path, payload: bytes) -> None:
    """Write bytes to `path` atomically: a temporary sibling, flushed to disk, then renamed over it."""
    # Opened by name, not by mkstemp, so that the file gets the user's usual permissions.
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_record(path: Path | str, *, kind: Kind | None = None) -> dict[str, Any]:
    """Read a record. Raises `RecordError` when it is missing, truncated, no record, or not of `kind`."""
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            payload = stream.read(MAX_RECORD_BYTES + 1)
        if len(payload) > MAX_RECORD_BYTES:
            raise RecordError(f"{path}: holds more than {MAX_RECORD_BYTES:,} bytes, so it is no record of ssmtune.")
        value = loads_strictly(payload.decode("utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such record. Run the stage that writes it first.") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RecordError(
            f"{path}: not a readable record ({error}). It may be truncated; run the stage again."
        ) from None
    if not isinstance(value, dict) or "kind" not in value:
        raise RecordError(f"{path}: holds no 'kind' field, so it is not a record of ssmtune.")
    if kind is not None and value["kind"] != kind:
        raise RecordError(f"{path}: is a record of kind {value['kind']!r}; expected {kind!r}.")
    return value


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Return 16 hex digits over the package's Python sources, read once: the code that this process runs."""
    root = Path(__file__).resolve().parent
    return digest({str(path.relative_to(root)): file_sha256(path) for path in sorted(root.rglob("*.py"))})


def find_records(directory: Path) -> dict[Path, dict[str, Any]]:
    """Return every record below `directory`, pre-registrations included, by its file, in the order of the paths.

    Other JSON is passed over. Raises `RecordError` when there is no record, or one that is cut off or damaged.
    """
    if not directory.is_dir():
        raise RecordError(f"{directory}: no such directory. Name one that holds records, or a single record.")
    found, others = {}, []
    for path in sorted([*directory.rglob("*.json"), *directory.rglob("*.json.gz")]):
        try:
            record = read_record(path)
        except RecordError as error:
            if _begins_as_record(path):
                raise
            others.append(str(error))
            continue
        if record["kind"] in (*get_args(Kind), "preregistration"):
            found[path] = record
        else:
            others.append(f"{path}: is of kind {record['kind']!r}, which ssmtune does not write.")
    if not found:
        seen = f" ({len(others)} other JSON files, the first: {others[0]})" if others else ""
        raise RecordError(f"{directory}: holds no record{seen}. Train, evaluate or run a study there first.")
    return found


def _begins_as_record(path: Path) -> bool:
    """Whether a file that cannot be read starts as `write_json` starts a record; a packed one may not even unpack."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(64)
    except (OSError, EOFError, zlib.error):
        return path.suffix == ".gz"
    return head.translate(None, b" \n\r\t").startswith(b'{"kind":') or (path.suffix == ".gz" and not head)


def _git_state() -> tuple[str | None, bool]:
    """Commit and dirtiness of the checkout that this file is tracked in; the stamp of a build without one; else None."""
    here = Path(__file__).resolve()
    stamp = here.parent / STAMP
    if stamp.is_file():
        return stamp.read_text(encoding="utf-8").strip(), False
    # Installed inside somebody's project, that project's commit says nothing about this code.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None, False
    return _git(here.parent, "rev-parse", "HEAD"), bool(
        _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    )


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"
