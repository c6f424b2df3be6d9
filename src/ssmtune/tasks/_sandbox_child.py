"""The inside of the sandbox: a script of its own, standard library only, that confines itself and then runs one job.

Run by `_sandbox.run_isolated` as `python -I -S _sandbox_child.py`, the job as JSON on stdin, the result as JSON on stdout.
Nothing here is imported by the package.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_REC, MS_PRIVATE = 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION = 0x20080522

MAX_FILE_BYTES = 1 << 20
MAX_OPEN_FILES = 32

CHANGES_FILES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.utime", "os.setxattr", "os.removexattr",
)  # fmt: skip
FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "resource.", "sys._current_frames", "gc.get_objects",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def isolate(directory: str) -> bool:
    """Enter namespaces without network, other processes or a writable file outside `directory`; False if refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    here = directory.encode()
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    writable = (ctypes.c_uint64 * 4)(0, MOUNT_ATTR_RDONLY, 0, 0)
    return bool(
        libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        and libc.mount(b"tmpfs", here, b"tmpfs", 0, b"size=8m,nr_inodes=256") == 0
        and libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, 32) == 0
        and libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, here, 0, writable, 32) == 0
    )


def give_up_rights() -> None:
    """Drop every capability that the namespaces gave, so that nothing can be undone from inside."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def limit(max_seconds: float, max_bytes: int) -> None:
    """Set the kernel's limits on processor time, memory, files and processes."""
    seconds = max(1, round(max_seconds))
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def watch(directory: str) -> None:
    """Refuse what the interpreter announces: sockets, processes, and writing outside `directory`."""

    def is_outside(path: Any) -> bool:
        return Path(directory) not in Path(os.fsdecode(path)).resolve().parents

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"the sandbox allows no {event}")
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = arguments
            writes = any(c in "wax+" for c in mode) if isinstance(mode, str) else bool((flags or 0) & WRITING)
            if writes and is_outside(path):
                raise PermissionError("the sandbox allows no writing outside its directory")
        if event in CHANGES_FILES and any(is_outside(a) for a in arguments if isinstance(a, (str, bytes))):
            raise PermissionError(f"the sandbox allows no {event} outside its directory")

    sys.addaudithook(hook)


class Verdict:
    """Keeps whatever leaves the block: what a program raises, an early `exit` included, is a result and no error of ours."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"status": "done"}

    def __enter__(self) -> Verdict:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.found = {"status": "error", "detail": f"{type(error).__name__}: {error}"[:500]}
        return True


def run_python(job: dict[str, Any]) -> dict[str, Any]:
    """Run `source`; done when it comes to its end without an exception."""
    with Verdict() as verdict:
        exec(compile(job["source"], "<program>", "exec"), {"__name__": "__main__"})
    return verdict.found


def run_sql(job: dict[str, Any]) -> dict[str, Any]:
    """Build a database in memory from `script`, then only read: rows or an error for each of `queries`."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(job["script"])
    reading = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}

    def authorize(action: int, first: str | None, second: str | None, *rest: Any) -> int:
        allowed = action in reading and second != "load_extension"
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    answers: list[Any] = []
    for query in job["queries"]:
        try:
            rows = connection.execute(query).fetchmany(job["max_rows"] + 1)
            plain = [[v.hex() if isinstance(v, bytes) else v for v in row] for row in rows]
            answers.append({"rows": plain} if len(rows) <= job["max_rows"] else {"error": "too many rows"})
        except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError) as error:
            answers.append({"error": f"{type(error).__name__}: {error}"[:500]})
    return {"status": "done", "value": answers}


def inner(job: dict[str, Any], directory: str, result: int) -> None:
    """The confined process: run the job and write its result."""
    limit(job["max_seconds"], job["max_bytes"])
    give_up_rights()
    if job["without"] != "hook":
        watch(directory)
    found = run_sql(job) if job["kind"] == "sql" else run_python(job)
    os.write(result, json.dumps({**found, "token": job["token"]}).encode())
    os._exit(0)


def main() -> None:
    """Read the job, confine, run it in a child of this process and say how that ended."""
    job = json.load(sys.stdin)
    result = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    directory = str(Path.cwd())
    isolated = job["without"] != "namespaces" and sys.platform == "linux" and isolate(directory)
    # The directory is another one when a file system of its own was laid over it.
    os.chdir(directory)
    child = os.fork()
    if child == 0:
        try:
            inner(job, directory, result)
        finally:
            os._exit(1)
    _, ended = os.waitpid(child, 0)
    killed = os.WTERMSIG(ended) if os.WIFSIGNALED(ended) else 0
    status = "timeout" if killed in (signal.SIGXCPU, signal.SIGKILL) else "killed" if killed else "ended"
    os.write(result, json.dumps({"end": status, "signal": killed, "isolated": isolated}).encode())


if __name__ == "__main__":
    main()
