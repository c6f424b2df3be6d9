"""A study that is killed, workers or driver, on this machine or on Ray, loses no finished cell and ends as it would have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cluster_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import killable_study

from ssmtune import records, study
from ssmtune.errors import ConfigError
from ssmtune.ray_workers import ray_slots
from ssmtune.workers import Job, local_slots, run_jobs

SCRIPT = Path(killable_study.__file__)


def start(folder: Path, engine: str) -> subprocess.Popen[bytes]:
    """A driver with a process group of its own."""
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder), engine], start_new_session=True)


def finished(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").glob("*.json.gz")}


def kill_and_resume(
    folder: Path, engine: str, *, kills: int, between: tuple[int, int], generator: random.Random
) -> None:
    """Kill the whole group after a random number of new cells, `kills` times; then let the study end."""
    for _ in range(kills):
        driver = start(folder, engine)
        before = finished(folder)
        wanted = len(before) + generator.randint(*between)
        deadline = time.monotonic() + 60
        while len(list((folder / "cells").glob("*.json.gz"))) < wanted and time.monotonic() < deadline:
            assert driver.poll() is None, "the study ended before it could be killed"
            time.sleep(0.002)
        # Somewhere inside a cell, or while its record is written.
        time.sleep(generator.random() * 0.01)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        after = finished(folder)
        assert len(after) >= wanted and all(after[name] == value for name, value in before.items())
    assert start(folder, engine).wait(60) == 0


def table(folder: Path) -> dict[str, Any]:
    """Everything of a study record but the time it was made at and the directory it is in."""
    record = records.read_record(folder / "study.json.gz", kind="study")
    del record["created"], record["config"]["output_dir"]
    return record


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The table of the study of 200 cells, left alone, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "environment", killable_study.environment)
        started = time.monotonic()
        study.run_study(killable_study.config(folder, 20), killable_study.cell, console=killable_study.QUIET)
        assert time.monotonic() - started < 10, "200 cells that do nothing take seconds"
    return table(folder)


def test_two_hundred_cells_killed_ten_times_end_with_the_same_table(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    kill_and_resume(tmp_path, "here", kills=10, between=(5, 18), generator=random.Random(0))
    assert undisturbed["num_cells"] == {"expected": 200, "done": 200}
    assert table(tmp_path) == undisturbed


def test_killed_with_its_worker_processes(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, "workers", kills=1, between=(3, 6), generator=random.Random(1))
    assert table(tmp_path)["num_cells"] == {"expected": 20, "done": 20}


def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    """Killed alone, without its group, a driver cannot tell its workers."""
    driver = start(tmp_path, "workers")
    while len(finished(tmp_path)) < 2:
        time.sleep(0.01)
    pids = {int(path.read_text()) for path in tmp_path.glob("*.pid")}
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        pids = {pid for pid in pids if _is_running(pid)}
        time.sleep(0.05)
    assert not pids


def _is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    driver = start(tmp_path, "here")
    try:
        while not finished(tmp_path):
            time.sleep(0.005)
        with pytest.raises(records.RecordError, match="another process runs this study"):
            study.run_study(killable_study.config(tmp_path, 20), killable_study.cell, console=killable_study.QUIET)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def test_cell_that_hangs_costs_its_own_cell_one_attempt(tmp_path: Path) -> None:
    config = killable_study.config(tmp_path, 2, workers=2, cell_seconds=4)
    result = study.run_study(config, killable_study.hanging_cell, console=killable_study.QUIET)
    assert result["num_cells"] == {"expected": 20, "done": 20} and result["num_failed_attempts"] == 1
    (hit,) = [record for record in study.read_cells(config) if record.get("failed_attempts")]
    assert (hit["name"], hit["seed"]) == ("arm3", 1)
    assert hit["failed_attempts"][0]["error"] == "the cell ran for more than 4 s and was ended"


def test_limit_of_cells_needs_workers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cell_seconds: 4 needs workers to end"):
        killable_study.config(tmp_path, 2, workers=0, cell_seconds=4)


class Interrupting:
    """A slot that another interrupt reaches while it is being killed."""

    def __init__(self) -> None:
        self.killed = False

    def submit(self, call: Callable[[Any], Any], argument: Any) -> Future[Any]:
        return Future()

    def cause(self, error: BaseException) -> BaseException:
        return error

    def restart(self) -> None:
        raise AssertionError("nothing died")

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        self.killed = True

    def close(self) -> None:
        raise AssertionError("nothing ended")


def test_second_interrupt_does_not_save_workers_from_the_first() -> None:
    """`timeout` sends two: to the study, and then to its whole process group."""
    slots = [Interrupting(), Interrupting()]
    jobs = [Job(key=key, argument=None) for key in ("a", "b")]
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(jobs, killable_study.cell, slots=slots))
    assert [slot.killed for slot in slots] == [True, True]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a real Ray cluster of one node with two CPUs."""
    # Ray's sockets lie in there, whose paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path(folder, "ray").mkdir()
        # What a cluster's nodes have installed: here also the cells of these tests.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {
            "num_cpus": 2,
            "num_gpus": 0,
            "object_store_memory": 80_000_000,
            "include_dashboard": False,
            "temp_dir": folder,
        }
        running = ray.cluster_utils.Cluster(initialize_head=True, connect=False, head_node_args=head)
        yield running.address
        running.shutdown()


def test_killed_driver_on_ray_ends_with_the_same_table(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_and_resume(tmp_path / "killed", cluster, kills=1, between=(3, 6), generator=random.Random(2))
    alone = killable_study.config(tmp_path / "alone", 2, workers=2)
    monkeypatch.setattr(records, "environment", killable_study.environment)
    study.run_study(alone, killable_study.cell, slots=local_slots(0), console=killable_study.QUIET)
    assert table(tmp_path / "killed")["num_cells"] == {"expected": 20, "done": 20}
    assert table(tmp_path / "killed") == table(tmp_path / "alone")


def test_killed_worker_on_ray_costs_its_own_cell_one_attempt(tmp_path: Path, cluster: str) -> None:
    config = killable_study.config(tmp_path, 2, workers=2)
    with pytest.MonkeyPatch.context() as patch, ray_slots(2, address=cluster) as slots:
        patch.setattr(records, "environment", killable_study.environment)
        assert len(slots) == 2
        result = study.run_study(config, killable_study.dying_cell, slots=slots, console=killable_study.QUIET)
    assert result["num_cells"] == {"expected": 20, "done": 20} and result["num_failed_attempts"] == 1
    (hit,) = [record for record in study.read_cells(config) if record.get("failed_attempts")]
    assert (hit["name"], hit["seed"]) == ("arm3", 1)
    assert "worker process died" in hit["failed_attempts"][0]["error"]


def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    with pytest.raises(ConfigError, match="no Ray cluster answers at 'nowhere'"), ray_slots(1, address="nowhere"):
        pass
