"""Jobs that may wait for one another, in worker processes pinned to devices; a dying worker takes one job with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Generic, TypeVar

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job(Generic[A]):
    """One call with `argument`; it starts once the job with key `needs` has succeeded."""

    key: str
    argument: A
    needs: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[R]):
    """How a job ended: its value, or its error; both None when the job it needs failed. `num_running` jobs go on."""

    value: R | None
    error: BaseException | None
    num_running: int


def run_jobs(
    jobs: Sequence[Job[A]],
    call: Callable[[A], R],
    *,
    workers: int,
    devices: Sequence[str] = (),
    done: frozenset[str] = frozenset(),
    succeeded: Callable[[R], bool] = lambda value: True,
) -> Generator[tuple[Job[A], Outcome[R]], None, None]:
    """Yield every job as it ends. `workers: 0` runs in this process; worker k sees only `devices[k % len(devices)]`.

    `done` are keys that count as succeeded already. Leaving the loop early (an exception, Ctrl-C) stops the workers.
    """
    slots = [
        _Slot(devices[k % len(devices)] if devices else None, in_process=workers == 0) for k in range(max(1, workers))
    ]
    finished_keys, failed_keys, queue = set(done), set[str](), list(jobs)
    running: dict[Future[R], tuple[_Slot, Job[A]]] = {}
    try:
        while queue or running:
            for job in [job for job in queue if job.needs in failed_keys]:
                queue.remove(job)
                failed_keys.add(job.key)
                yield job, Outcome(value=None, error=None, num_running=len(running))
            busy = {id(slot) for slot, _ in running.values()}
            for slot in [slot for slot in slots if id(slot) not in busy]:
                ready = next((job for job in queue if job.needs is None or job.needs in finished_keys), None)
                if ready is not None:
                    queue.remove(ready)
                    running[slot.submit(call, ready.argument)] = (slot, ready)
            assert running or not queue, "a job needs one that is neither done nor listed"
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, job = running.pop(future)
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    # An interrupt or exit inside a job is meant for the whole, not for the job.
                    raise error
                if isinstance(error, BrokenProcessPool):
                    slot.restart()
                value = future.result() if error is None else None
                good = error is None and succeeded(future.result())
                (finished_keys if good else failed_keys).add(job.key)
                yield job, Outcome(value=value, error=error, num_running=len(running))
    except BaseException:
        for slot in slots:
            slot.kill()
        raise
    for slot in slots:
        slot.executor.shutdown()


class _Slot:
    """A pool of a single process, so that which worker died, and with which job, is never in doubt."""

    def __init__(self, device: str | None, *, in_process: bool) -> None:
        self.device = device
        self.in_process = in_process
        self.pid: int | None = None
        self.executor = self._start()

    def _start(self) -> Executor:
        if self.in_process:
            return ThreadPoolExecutor(max_workers=1)
        return ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=_pin, initargs=(self.device,)
        )

    def submit(self, call: Callable[[A], R], argument: A) -> Future[R]:
        if self.pid is None and not self.in_process:
            self.pid = self.executor.submit(os.getpid).result()
        return self.executor.submit(call, argument)

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


def _pin(device: str | None) -> None:
    # Ctrl-C is the parent's to handle: it stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
