"""Run what a model wrote, Python or SQL, in a process that can do nothing but compute, for a limited time.

Layers, from the outside in: an own process group, killed at the end; an empty temporary directory; on Linux, where the
kernel allows it, own namespaces (no network, no other process, every file outside the directory read-only); limits on
processor time, memory, file size, open files and processes; an audit hook that refuses sockets, processes and writing
elsewhere. It keeps a careless program from doing harm. It is no jail for a hostile one: files stay readable, and where
namespaces are refused only the inner layers hold (`Outcome.isolated` says which); use a virtual machine for those.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ssmtune.errors import MissingDependency

CHILD = Path(__file__).with_name("_sandbox_child.py")

MAX_SECONDS = 5.0
"""Processor time; a program that sleeps is stopped after some multiple of it on the clock."""

GRACE_S = 5.0
"""On the clock, for a machine that is busy."""

MAX_BYTES = 512 << 20


Status = Literal["done", "error", "timeout", "killed", "ended"]
STATUSES = get_args(Status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended: `value` is what a done one gave, `detail` why another did not. `isolated`: namespaces were used."""

    status: Status
    value: Any = None
    detail: str = ""
    isolated: bool = False


def run_python(source: str, **limits: Any) -> Outcome:
    """Run a program; `done` says that it came to its end, `ended` that it left before, `error` that it raised."""
    return run_isolated({"kind": "python", "source": source}, **limits)


def run_queries(script: str, queries: list[str], *, max_rows: int = 10_000, **limits: Any) -> Outcome:
    """Build a SQLite database in memory from `script` and only read it: `value` has {"rows"} or {"error"} per query."""
    return run_isolated({"kind": "sql", "script": script, "queries": queries, "max_rows": max_rows}, **limits)


def run_isolated(
    job: Mapping[str, Any],
    *,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
    without: Literal["", "namespaces", "hook"] = "",
) -> Outcome:
    """Run one job of `_sandbox_child`. Raises `MissingDependency` on a system without process limits (Windows).

    `max_seconds` of processor time, `max_bytes` of address space; `without` leaves one layer out, to test the others.
    """
    if os.name != "posix":
        raise MissingDependency("running what a model wrote needs Linux or macOS: Windows has no limits on a process.")
    # Only a job that came to its end can repeat the token; printing, or leaving early, is no success.
    token = secrets.token_hex(16)
    request = json.dumps(
        {**job, "token": token, "max_seconds": max_seconds, "max_bytes": max_bytes, "without": without}
    )
    with (
        tempfile.TemporaryDirectory(prefix="ssmtune-sandbox-") as directory,
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": os.defpath},
            start_new_session=True,
        ) as process,
    ):
        try:
            written, _ = process.communicate(request.encode(), timeout=GRACE_S + 3 * max_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(status="timeout", detail=f"still running after {GRACE_S + 3 * max_seconds:g} s on the clock")
        finally:
            _kill_group(process.pid)
    return _outcome(written.decode("utf-8", "replace"), token)


def _kill_group(pid: int) -> None:
    """End what the job left behind."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # Nothing is left, or (on macOS) only a process that has ended already.
        pass


def _outcome(text: str, token: str) -> Outcome:
    """What the two processes of the job wrote, one JSON object each."""
    found: dict[str, Any] = {}
    ended: dict[str, Any] = {"end": "killed"}
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        try:
            entry, position = decoder.raw_decode(text, position)
        except ValueError:
            break
        if isinstance(entry, dict) and entry.get("token") == token:
            found = entry
        elif isinstance(entry, dict) and "end" in entry:
            ended = entry
    facts = found or {"status": ended["end"], "detail": f"the process ended with signal {ended.get('signal', 0)}"}
    return Outcome(
        status=facts["status"] if facts["status"] in STATUSES else "killed",
        value=facts.get("value"),
        detail=facts.get("detail", ""),
        isolated=bool(ended.get("isolated")),
    )
