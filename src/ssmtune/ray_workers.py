"""Slots for `workers.run_jobs` on a Ray cluster that is already running: one actor each, which runs job after job."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from ssmtune.errors import ConfigError, MissingDependency
from ssmtune.workers import Slot, WorkerDied

A = TypeVar("A")
R = TypeVar("R")


@contextlib.contextmanager
def ray_slots(workers: int, *, address: str = "auto") -> Iterator[list[Slot]]:
    """Yield up to `workers` slots, one CPU each, fewer where the cluster has fewer; its GPUs are shared out evenly.

    Every node must see the study's output directory under the same path, and have ssmtune installed. Raises
    `MissingDependency` without Ray, `ConfigError` where no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise MissingDependency("--engine ray needs Ray. Run: pip install 'ssmtune[ray]'") from None
    if ray.is_initialized():
        raise ConfigError(
            "--engine ray: this process is connected to a Ray cluster already. Call ray.shutdown() first."
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="ssmtune")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--engine ray: no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). "
            "Start one with 'ray start --head', or give its --address."
        ) from None
    try:
        there = ray.cluster_resources()
        num = max(1, min(workers, int(there.get("CPU", 1))))
        gpus = there.get("GPU", 0.0)
        yield [_Actor(min(1.0, gpus / num)) for _ in range(num)]
    finally:
        ray.shutdown()


class _Actor:
    """A slot whose process is a Ray actor: Ray starts it where there is room, and says when it died."""

    def __init__(self, num_gpus: float) -> None:
        import ray

        # An actor that Ray itself restarted would run a job again behind the study's back.
        self.make = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(_Runner)
        self.actor: Any = None

    def submit(self, call: Callable[[A], R], argument: A) -> Future[R]:
        if self.actor is None:
            self.actor = self.make.remote()
        future: Future[R] = self.actor.run.remote(call, argument).future()
        return future

    def cause(self, error: BaseException) -> BaseException:
        import ray

        if isinstance(error, ray.exceptions.RayTaskError):
            cause: BaseException = error.cause
            return cause
        lost = isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError))
        return WorkerDied(str(error)) if lost else error

    def restart(self) -> None:
        self.actor = None

    def kill(self) -> None:
        import ray

        if self.actor is not None and ray.is_initialized():
            ray.kill(self.actor)

    def close(self) -> None:
        self.kill()


class _Runner:
    """What runs in the actor's process, which keeps what one job has loaded for the next."""

    def run(self, call: Callable[[A], R], argument: A) -> R:
        return call(argument)
