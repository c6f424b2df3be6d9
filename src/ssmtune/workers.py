"""Jobs that may wait for one another, in worker processes pinned to devices; a dying worker takes one job with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[A]):
    """One call with `argument`; it starts once the jobs with keys `needs` have succeeded."""

    key: str
    argument: A
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[R]):
    """How a job ended: its value, or its error; both None when a job it needs failed. `num_running` jobs go on.

    `earlier`: the errors of the attempts before this one.
    """

    value: R | None
    error: BaseException | None
    num_running: int
    earlier: tuple[BaseException, ...] = ()


class WorkerDied(Exception):
    """The process that a job ran in ended: killed, or out of memory."""


class JobOverdue(Exception):
    """A job ran for longer than any may; its process was ended."""


class Slot(Protocol):
    """Where one job at a time runs, one after another in the same process."""

    def submit(self, call: Callable[[A], R], argument: A) -> Future[R]:
        """Start `call(argument)`; the process is started with the first one."""

    def cause(self, error: BaseException) -> BaseException:
        """Return what a job raised, or `WorkerDied`, for the exception of its future."""

    def restart(self) -> None:
        """Make the slot usable again after its process died."""

    def kill(self) -> None:
        """End the process and what runs in it."""

    def close(self) -> None:
        """End the process once it is idle."""


def run_jobs(
    jobs: Sequence[Job[A]],
    call: Callable[[A], R],
    *,
    slots: Sequence[Slot],
    done: frozenset[str] = frozenset(),
    succeeded: Callable[[R], bool] = lambda value: True,
    retries: int = 0,
    is_final: Callable[[BaseException], bool] = lambda error: False,
    seconds: float | None = None,
) -> Generator[tuple[Job[A], Outcome[R]], None, None]:
    """Yield every job as it ends, for good: one that raised is run `retries` times more, after all others, unless `is_final`.

    `done` are keys that count as succeeded already. A job that takes longer than `seconds` has raised `JobOverdue`, and its
    process is ended; that needs slots with a process of their own.
    Leaving the loop early (an exception, Ctrl-C) stops the workers.
    """
    finished_keys, failed_keys, queue = set(done), set[str](), list(jobs)
    running: dict[Future[R], tuple[Slot, Job[A], float]] = {}
    errors: dict[str, tuple[BaseException, ...]] = {}
    try:
        while queue or running:
            for job in [job for job in queue if not failed_keys.isdisjoint(job.needs)]:
                queue.remove(job)
                failed_keys.add(job.key)
                yield job, Outcome(value=None, error=None, num_running=len(running))
            busy = {id(slot) for slot, _, _ in running.values()}
            for slot in [slot for slot in slots if id(slot) not in busy]:
                ready = next((job for job in queue if finished_keys.issuperset(job.needs)), None)
                if ready is not None:
                    queue.remove(ready)
                    running[slot.submit(call, ready.argument)] = (slot, ready, time.monotonic())
            assert running or not queue, "a job needs one that is neither done nor listed"
            ended = wait(running, timeout=_until_overdue(running, seconds), return_when=FIRST_COMPLETED).done
            late = (
                [] if seconds is None else [f for f, entry in running.items() if entry[2] + seconds <= time.monotonic()]
            )
            for future in {**dict.fromkeys(ended), **dict.fromkeys(late)}:
                slot, job, _ = running.pop(future)
                if future in ended:
                    raised = future.exception()
                    error = None if raised is None else slot.cause(raised)
                else:
                    error = JobOverdue(f"ran for more than {seconds:g} s and was ended")
                    slot.kill()
                if error is not None and not isinstance(error, Exception):
                    # An interrupt or exit inside a job is meant for the whole, not for the job.
                    raise error
                if isinstance(error, (WorkerDied, JobOverdue)):
                    slot.restart()
                earlier = errors.get(job.key, ())
                if error is not None and len(earlier) < retries and not is_final(error):
                    errors[job.key] = (*earlier, error)
                    queue.append(job)
                    continue
                value = future.result() if error is None else None
                good = error is None and succeeded(future.result())
                (finished_keys if good else failed_keys).add(job.key)
                yield job, Outcome(value=value, error=error, num_running=len(running), earlier=earlier)
    except BaseException:
        with _uninterrupted():
            for slot in slots:
                slot.kill()
        raise
    for slot in slots:
        slot.close()


def _until_overdue(running: dict[Future[R], tuple[Slot, Job[A], float]], seconds: float | None) -> float | None:
    """How long to wait at most, in seconds, until the first of the running jobs is overdue."""
    if seconds is None:
        return None
    return max(0.0, min(started for _, _, started in running.values()) + seconds - time.monotonic())


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the first from being carried out; `timeout` sends two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def local_slots(workers: int, devices: Sequence[str] = ()) -> list[Slot]:
    """Return slots on this machine. `workers: 0` is this process; worker k sees only `devices[k % len(devices)]`."""
    if workers == 0:
        return [_Thread()]
    threads = max(1, (os.cpu_count() or 1) // workers)
    return [_Process(devices[k % len(devices)] if devices else None, threads) for k in range(workers)]


class _Thread:
    """A slot in this process."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1)

    def submit(self, call: Callable[[A], R], argument: A) -> Future[R]:
        return self.executor.submit(call, argument)

    def cause(self, error: BaseException) -> BaseException:
        return error

    def restart(self) -> None:
        raise AssertionError("this process is alive")

    def kill(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self.executor.shutdown()


class _Process:
    """A pool of a single process, so that which worker died, and with which job, is never in doubt."""

    def __init__(self, device: str | None, threads: int) -> None:
        self.device, self.threads = device, threads
        self.pid: int | None = None
        self.executor = self._start()

    def _start(self) -> Executor:
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_pin,
            initargs=(self.device, self.threads),
        )

    def submit(self, call: Callable[[A], R], argument: A) -> Future[R]:
        if self.pid is None:
            # Asked in the background: waiting here would start the workers one after another.
            self.executor.submit(os.getpid).add_done_callback(self._remember)
        return self.executor.submit(call, argument)

    def _remember(self, future: Future[int]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.pid = future.result()

    def cause(self, error: BaseException) -> BaseException:
        return WorkerDied(str(error)) if isinstance(error, BrokenProcessPool) else error

    def restart(self) -> None:
        self.executor.shutdown(wait=False)
        self.executor, self.pid = self._start(), None

    def kill(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        if self.pid is not None:
            try:
                os.kill(self.pid, signal.SIGTERM)
            except ProcessLookupError:
                return

    def close(self) -> None:
        self.executor.shutdown()


def _pin(device: str | None, threads: int) -> None:
    # Ctrl-C is the parent's to handle: it stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Read when torch is loaded, which is later: as many threads each as there are cores would stand in one another's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """A killed parent sends no signal; its workers would wait for it forever, or go on beside those of its successor."""
    parent.join()
    os._exit(1)
