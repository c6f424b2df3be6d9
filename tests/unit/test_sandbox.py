"""The sandbox: what a program may not do, with all layers, without namespaces, and without the hook."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssmtune.errors import MissingDependency
from ssmtune.tasks import _sandbox
from ssmtune.tasks._sandbox import run_python, run_queries

LAYERS = ("", "namespaces")
every_layer = pytest.mark.parametrize("without", LAYERS)

WALLS = ("hook",) if run_python("pass").isolated else ()
"""What the kernel's namespaces stop is seen with the hook left out, where the kernel gives namespaces."""


@every_layer
def test_a_program_that_ends_is_done(without: str) -> None:
    outcome = run_python("import math, re, typing\nprint('x' * 10**6)\nassert math.sqrt(4) == 2", without=without)
    assert (outcome.status, outcome.detail) == ("done", "")


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("assert 1 == 2, 'no'", "error", "AssertionError: no"),
        ("def f(:", "error", "SyntaxError"),
        ("import sys; sys.exit(0)", "error", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended", "signal 0"),
        ('print(\'{"status": "done", "token": ""}\')\nraise ValueError', "error", "ValueError"),
        ('import os\nos.write(3, b\'{"status": "done", "token": "guess"}\')\nos._exit(0)', "ended", ""),
        ("import os\nos.write(3, b'not json')\nos._exit(0)", "killed", ""),
        ("def f(): f()\nf()", "error", "RecursionError"),
    ],
)
def test_only_a_program_that_comes_to_its_end_is_done(source: str, status: str, detail: str) -> None:
    outcome = run_python(source)
    assert outcome.status == status and detail in outcome.detail


def test_an_infinite_loop_ends() -> None:
    outcome = run_python("while True: pass", max_seconds=1)
    # By the limit on processor time, long before the one on the clock.
    assert outcome.status == "timeout" and "signal" in outcome.detail


def test_a_sleeping_program_ends_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox, "GRACE_S", 0.5)
    outcome = run_python("import time; time.sleep(60)", max_seconds=0.1)
    assert outcome.status == "timeout" and "on the clock" in outcome.detail


def test_a_memory_bomb_ends() -> None:
    outcome = run_python("x = [bytearray(50 << 20) for _ in range(40)]", max_bytes=256 << 20)
    assert outcome.status == "error" and "MemoryError" in outcome.detail


@pytest.mark.parametrize("without", [*LAYERS, *WALLS])
@pytest.mark.parametrize(
    "change", ["open({!r}, 'w').write('x')", "import os; os.remove({!r})", "import os; os.truncate({!r}, 0)"]
)
def test_nothing_outside_is_written(change: str, without: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("kept")
    outcome = run_python(change.format(str(victim)), without=without)
    assert victim.read_text() == "kept"
    assert outcome.status == "error"
    assert ("Read-only file system" if without == "hook" else "sandbox allows no") in outcome.detail


@every_layer
def test_its_own_directory_is_writable_up_to_a_size_and_gone_afterwards(without: str) -> None:
    source = "import os\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'\nassert os.listdir('.') == ['a']"
    assert run_python(source, without=without).status == "done"
    assert "File too large" in run_python("open('a', 'wb').write(b'x' * (4 << 20))", without=without).detail


@pytest.mark.parametrize("without", [*LAYERS, *WALLS])
def test_there_is_no_network(without: str) -> None:
    source = "import socket\ns = socket.socket()\ns.connect(('127.0.0.1', 9))"
    outcome = run_python(source, without=without)
    detail = "Network is unreachable" if without == "hook" else "sandbox allows no socket"
    assert outcome.status == "error" and detail in outcome.detail


@every_layer
@pytest.mark.parametrize(
    "source",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes; ctypes.CDLL(None).fork()",
        "import os; os.execv('/bin/true', ['true'])",
    ],
)
def test_there_are_no_other_processes(source: str, without: str) -> None:
    outcome = run_python(source, without=without)
    assert outcome.status == "error" and "sandbox allows no" in outcome.detail


def test_a_program_without_a_hook_sees_only_its_own_processes() -> None:
    """The process that started the sandbox has a number that does not exist inside."""
    outcome = run_python(f"import os; os.kill({os.getpid()}, 0)", without="hook")
    assert ("ProcessLookupError" in outcome.detail) == outcome.isolated == bool(WALLS)


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert run_python("import os; assert 'SECRET_TOKEN' not in os.environ, os.environ").status == "done"
    assert "ModuleNotFoundError" in run_python("import torch").detail


def test_windows_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sandbox.os, "name", "nt")
    with pytest.raises(MissingDependency, match="needs Linux or macOS"):
        run_python("pass")


# SQL

SCRIPT = "create table t (a integer, b text); insert into t values (1, 'x'), (2, null);"


def test_queries_read() -> None:
    outcome = run_queries(SCRIPT, ["select * from t", "select count(*), upper('q') from t", "select x'ff'"])
    assert [answer["rows"] for answer in outcome.value] == [[[1, "x"], [2, None]], [[2, "Q"]], [["ff"]]]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("delete from t", "not authorized"),
        ("insert into t values (3, 'y')", "not authorized"),
        ("drop table t", "not authorized"),
        ("attach '/tmp/x.db' as y", "not authorized"),
        ("pragma writable_schema = 1", "not authorized"),
        ("select load_extension('x')", "not authorized"),
        ("select 1; select 2", "one statement"),
        ("select * from u", "no such table"),
        ("select zeroblob(2000000000)", "too big"),
        ("", ""),
        ("select a from t \ud800", "UnicodeEncodeError"),
        (
            "with recursive c(x) as (select 1 union all select x + 1 from c limit 20000) select x from c",
            "too many rows",
        ),
    ],
)
def test_queries_only_read(query: str, error: str) -> None:
    answers = run_queries(SCRIPT, [query, "select count(*) from t"]).value
    assert error in answers[0].get("error", "")
    assert answers[1] == {"rows": [[2]]}


def test_a_query_without_end_ends() -> None:
    endless = "with recursive c(x) as (select 1 union all select x + 1 from c) select count(*) from c"
    assert run_queries(SCRIPT, [endless], max_seconds=1).status == "timeout"
