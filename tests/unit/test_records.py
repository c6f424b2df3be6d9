"""Records are whole or absent, and refuse to be read when they are not."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ssmtune import records
from ssmtune.errors import RecordError

KILLED_IN_BETWEEN = """
import os, signal, sys
from pathlib import Path
from ssmtune import records
original = {target}
def dying(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{target} = dying
records.write_json(Path(sys.argv[1]), {{"kind": "train", "value": "new" * 1000}})
"""


@pytest.mark.parametrize("target", ["Path.replace", "os.fsync"])
def test_killed_between_write_and_rename_leaves_the_old_record(target: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write_json(path, {"kind": "train", "value": "old"})
    before = path.read_bytes()
    code = KILLED_IN_BETWEEN.format(target=target)
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert records.read_record(path)["value"] == "old"
    records.write_json(path, {"kind": "train", "value": "newer"})
    assert records.read_record(path)["value"] == "newer"


def test_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    records.write_json(path, {"kind": "train"})

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        records.write_json(path, {"kind": "study"})
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert records.read_record(path)["kind"] == "train"


def test_value_that_is_no_json_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    records.write_json(path, {"kind": "train"})
    with pytest.raises(ValueError, match="JSON"):
        records.write_json(path, {"kind": "train", "loss": math.nan})
    assert records.read_record(path) == {"kind": "train"}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_truncated_record_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run{suffix}"
    records.write_json(path, {"kind": "train", "history": list(range(500))})
    whole = path.read_bytes()
    assert records.read_record(path, kind="train")["history"][-1] == 499
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError, match="not a readable record.*truncated"):
            records.read_record(path)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = records.write_json(tmp_path / "run.json.gz", {"kind": "train", "history": list(range(500))})
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 0xFF
    path.write_bytes(bytes(payload))
    with pytest.raises(RecordError, match="not a readable record"):
        records.read_record(path)


def test_missing_foreign_and_mistaken_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such record"):
        records.read_record(tmp_path / "absent.json")
    for text in ("[]", "{}", '"kind"'):
        (tmp_path / "foreign.json").write_text(text)
        with pytest.raises(RecordError, match="no 'kind' field"):
            records.read_record(tmp_path / "foreign.json")
    records.write_json(tmp_path / "run.json", {"kind": "train"})
    with pytest.raises(RecordError, match="kind 'train'; expected 'study'"):
        records.read_record(tmp_path / "run.json", kind="study")


def test_equal_records_are_equal_bytes(tmp_path: Path) -> None:
    value = {"kind": "train", "text": "\u00e9", "list": [1, 2.5, None]}
    first, second = (records.write_json(tmp_path / f"{n}.json.gz", value).read_bytes() for n in "ab")
    assert first == second
    assert json.loads(gzip.decompress(first)) == value


def test_digest_ignores_the_order_of_keys_only() -> None:
    assert records.digest({"a": 1, "b": [1, 2]}) == records.digest({"b": [1, 2], "a": 1})
    assert records.digest({"a": [1, 2]}) != records.digest({"a": [2, 1]})
    assert records.digest({"a": 1}) != records.digest({"a": "1"})
    assert len(records.digest({})) == 16


def test_new_record_says_where_it_comes_from() -> None:
    record = records.new_record("train", config={"seed": 1}, note="x")
    assert record["kind"] == "train" and record["status"] == "done" and record["note"] == "x"
    environment = record["environment"]
    assert {"torch", "transformers", "peft", "trl"} <= set(environment["versions"])
    assert environment["python"].count(".") == 2 and environment["device"]
    json.dumps(record, allow_nan=False)


def test_the_code_digest_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "ssmtune"
    package.mkdir()
    (package / "records.py").write_text("a = 1\n", encoding="utf-8")
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    compute = records.code_digest.__wrapped__
    before = compute()
    assert before == compute()
    (package / "records.py").write_text("a = 2\n", encoding="utf-8")
    assert compute() != before
