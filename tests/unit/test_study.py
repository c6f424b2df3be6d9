"""Studies: what is run, skipped, retried and compared, with planted failures."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich.console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import synthetic_records as synthetic

from ssmtune import config as decoding
from ssmtune import records, study
from ssmtune.errors import ConfigError, RecordError
from ssmtune.study import CellSpec, StudyConfig

QUIET = rich.console.Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def fixed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git and the device for every record would be most of the time of these tests."""
    monkeypatch.setattr(records, "environment", lambda: synthetic.ENVIRONMENT)


def make(folder: Path, **changes: Any) -> StudyConfig:
    """One task, two seeds, three trained arms and a base."""
    small = {"tasks": [{"name": "classification", "size": "full", "primary": "exact"}], "seeds": [0, 1]}
    return decoding.decode(
        StudyConfig, synthetic.study_mapping(str(folder), **{**small, **changes}), where="study.yaml"
    )


def run(config: StudyConfig, run_cell: Callable[[CellSpec], dict[str, Any]], **options: Any) -> dict[str, Any]:
    return study.run_study(config, run_cell, console=QUIET, **options)


class Counting:
    """A cell function that remembers what it ran and fails where told to."""

    def __init__(self, fails: str = "") -> None:
        self.ran: list[str] = []
        self.fails = fails

    def __call__(self, spec: CellSpec) -> dict[str, Any]:
        self.ran.append(f"{spec.cell}-{spec.seed}")
        if spec.cell == self.fails:
            raise ValueError(f"planted fault in {spec.cell}")
        return synthetic.fake_cell(spec)


def test_runs_once_and_preregisters_first(tmp_path: Path) -> None:
    config = make(tmp_path)

    def first(spec: CellSpec) -> dict[str, Any]:
        assert list(tmp_path.glob("preregistration-*.json")), "a cell ran before the study was registered"
        return synthetic.fake_cell(spec)

    result = run(config, first)
    assert result["status"] == "done" and result["num_cells"] == {"expected": 7, "done": 7}
    registered = json.loads(next(tmp_path.glob("preregistration-*.json")).read_text())
    assert registered["num_comparisons"] == 3 and registered["primary_outcomes"] == {"classification": "exact"}
    # Two seeds leave one degree of freedom, which resolves nearly nothing: that has to be said in advance.
    assert registered["minimum_detectable_effect"] > 0.5
    assert (tmp_path / "cells" / "V4-classification-seed1.json.gz").exists()
    again = Counting()
    run(config, again)
    assert again.ran == []
    assert records.read_record(tmp_path / "study.json.gz", kind="study")["name"] == "granite-controls"


def test_base_runs_at_the_first_seed_only(tmp_path: Path) -> None:
    names = [f"{c.spec.cell}-{c.spec.seed}" for c in study.expand(make(tmp_path))]
    assert names.count("base-0") == 1 and "base-1" not in names and "V1-1" in names


def test_changed_config_reruns_only_what_it_determines(tmp_path: Path) -> None:
    run(make(tmp_path), synthetic.fake_cell)
    cells = synthetic.study_mapping("")["cells"]
    cells["V4"] = {"recipe": "all+core", "train": {"core_learning_rate": 5e-3}}
    changed = Counting()
    run(make(tmp_path, cells=cells), changed)
    assert changed.ran == ["V4-0", "V4-1"]
    other = Counting()
    run(make(tmp_path, cells=cells), other, inputs={"model": "another digest"})
    assert len(other.ran) == 7
    assert len(list(tmp_path.glob("preregistration-*.json"))) == 3


def test_failure_is_kept_counted_and_retried(tmp_path: Path) -> None:
    config = make(tmp_path)
    result = run(config, Counting(fails="V2"))
    assert result["num_cells"] == {"expected": 7, "done": 5, "failed": 2} and result["status"] == "provisional"
    assert result["failures"][0]["error"] == "ValueError: planted fault in V2"
    assert [c["arm"] for c in result["comparisons"]] == ["V1"], "an arm without data cannot be compared"
    # The two comparisons that could not be made still count against the one that was.
    assert result["comparisons"][0]["p_holm"] == pytest.approx(min(1.0, 3 * result["comparisons"][0]["p"]))
    kept = records.read_record(tmp_path / "cells" / "V2-classification-seed0.json.gz")
    assert kept["status"] == "failed" and "planted fault" in kept["traceback"]
    retry = Counting()
    assert run(config, retry)["status"] == "done"
    assert retry.ran == ["V2-0", "V2-1"]


def test_truncated_or_corrupt_record_is_run_again(tmp_path: Path) -> None:
    config = make(tmp_path)
    run(config, synthetic.fake_cell)
    truncated, corrupt = (tmp_path / "cells" / f"{n}-classification-seed0.json.gz" for n in ("V1", "V2"))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    payload = bytearray(corrupt.read_bytes())
    payload[40:80] = bytes(40)
    corrupt.write_bytes(bytes(payload))
    (tmp_path / "cells" / "base-classification-seed0.json.gz").write_bytes(gzip.compress(b'{"kind": "train"}'))
    assert len(study.read_cells(config)) == 4
    again = Counting()
    run(config, again)
    assert sorted(again.ran) == ["V1-0", "V2-0", "base-0"]


def kill_first_time(marker: str, spec: CellSpec) -> dict[str, Any]:
    """Kills its own worker process in one cell, as an out-of-memory killer would; says which device it saw."""
    if spec.cell == "V2" and spec.seed == 0 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    records.environment = lambda: synthetic.ENVIRONMENT  # this process is the worker's own
    result = synthetic.fake_cell(spec)
    result["evaluate"]["device_seen"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return result


def test_killed_worker_fails_its_own_cell_only(tmp_path: Path) -> None:
    config = make(tmp_path, workers=2, retries=0)
    cell = functools.partial(kill_first_time, str(tmp_path / "killed"))
    result = run(config, cell, devices=["3", "5"])
    assert result["num_cells"] == {"expected": 7, "done": 6, "failed": 1}
    assert result["failures"][0]["name"] == "V2" and "worker process died" in result["failures"][0]["error"]
    seen = {r["evaluate"]["device_seen"] for r in study.read_cells(config) if r["status"] == "done"}
    assert seen == {"3", "5"}
    assert run(make(tmp_path, workers=1), cell, devices=["3"])["status"] == "done"


def test_ctrl_c_leaves_finished_cells_done(tmp_path: Path) -> None:
    config = make(tmp_path)

    def interrupted(spec: CellSpec) -> dict[str, Any]:
        if spec.cell == "V2":
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        return synthetic.fake_cell(spec)

    def raising(spec: CellSpec) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupted)
    # The cell that was interrupted may end in its thread; none is begun after it.
    assert {"base", "V1"} <= {r["name"] for r in study.read_cells(config)} <= {"base", "V1", "V2"}
    with pytest.raises(KeyboardInterrupt):
        run(config, raising)
    rest = Counting()
    run(config, rest)
    assert "V1-0" not in rest.ran and "V4-0" in rest.ran


def test_reuse_waits_for_its_source_and_fails_with_it(tmp_path: Path) -> None:
    cells = {"V3": {"reuse": "V4"}, "V4": {"recipe": "all+core"}}
    config = make(tmp_path, cells=cells, comparisons=[["V3", "V4"]], seeds=[0])

    def reusing(spec: CellSpec) -> dict[str, Any]:
        if spec.reuse_run:
            assert Path(spec.reuse_run).name.startswith("V4-classification-seed0-")
            return {"train": None, "evaluate": synthetic.evaluate_record("V4", spec.task, spec.seed)}
        return synthetic.fake_cell(spec)

    failed = run(config, Counting(fails="V4"))
    assert failed["num_cells"]["failed"] == 2
    assert "whose run it reuses" in next(f["error"] for f in failed["failures"] if f["name"] == "V3")
    result = run(config, reusing)
    assert result["comparisons"][0]["verdict"] == "no difference" and result["comparisons"][0]["difference"] == 0


def test_provisional_run_enters_no_table(tmp_path: Path) -> None:
    def unverified(spec: CellSpec) -> dict[str, Any]:
        result = synthetic.fake_cell(spec)
        if spec.cell == "V4":
            result["train"]["status"] = "provisional"
        return result

    result = run(make(tmp_path), unverified)
    assert [arm["name"] for arm in result["tasks"][0]["arms"]] == ["base", "V1", "V2"]
    assert result["num_cells"]["provisional"] == 2


def test_different_examples_are_not_paired(tmp_path: Path) -> None:
    def shifted(spec: CellSpec) -> dict[str, Any]:
        result = synthetic.fake_cell(spec)
        if spec.cell == "V1":
            result["evaluate"]["example_ids"] = result["evaluate"]["example_ids"][::-1]
        return result

    with pytest.raises(RecordError, match="different examples"):
        run(make(tmp_path), shifted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparisons": [["V9", "base"]]}, "no cell is named 'V9'"),
        ({"comparisons": [["V1", "V1"]]}, "names one cell twice"),
        ({"seeds": []}, "'seeds': got nothing"),
        ({"seeds": [1, 1]}, "expected no entry twice"),
        ({"cells": {"a/b": {}}, "comparisons": []}, "becomes a file name"),
        ({"cells": {"a": {"reuse": "b"}, "b": {}}, "comparisons": []}, "trains nothing"),
        ({"cells": {"a": {"recipe": "x", "reuse": "b"}, "b": {"recipe": "x"}}, "comparisons": []}, "Remove one"),
        ({"cels": {}}, "nearest: 'cells'"),
    ],
)
def test_bad_config_names_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **changes)


def test_cells_of_different_code_make_a_study_provisional(tmp_path: Path) -> None:
    config = make(tmp_path)
    assert run(config, synthetic.fake_cell)["mixed_code"] == []
    path = next((tmp_path / "cells").glob("V2-*.json.gz"))
    record = records.read_record(path)
    record["environment"] = {**record["environment"], "code": "another"}
    records.write_json(path, record)
    result = study.analyse(study.read_cells(config), config)
    assert result["mixed_code"] == ["classification"]
    assert result["status"] == "provisional"
