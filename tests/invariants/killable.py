"""Trains in forked children that kill themselves at a chosen event; requests come as JSON lines on stdin.

One process pays for the imports. Each child counts the events at which a run touches the disk or the weights: a rename,
a tensor file, the removal of a checkpoint, an optimiser step. At the chosen one it does half of the work and dies by
SIGKILL, as a machine does. Without a choice it runs to the end and answers with the events that it saw.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)

from ssmtune import sft  # noqa: E402, F401  (the slow import, paid once)
from ssmtune.config import decode  # noqa: E402
from ssmtune.train import TrainConfig, train  # noqa: E402


class Events:
    """Counts events and dies at number `kill_at`."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.names: list[str] = []

    def happens(self, name: str, half: Callable[[], None]) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.kill_at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


def install(events: Events) -> None:
    """Watch the four kinds of event in this process."""
    replace, save, rmtree, step = Path.replace, torch.save, shutil.rmtree, torch.optim.AdamW.step

    def watched_replace(source: Path, target: Any) -> Path:
        events.happens(f"replace {Path(target).name}", lambda: None)
        return replace(source, target)

    def watched_save(value: Any, target: Any, *args: Any, **options: Any) -> None:
        def half() -> None:
            buffer = io.BytesIO()
            save(value, buffer)
            Path(target).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])

        events.happens(f"save {Path(target).name}", half)
        save(value, target, *args, **options)

    def watched_rmtree(path: Any, *args: Any, **options: Any) -> None:
        def half() -> None:
            files = sorted(p for p in Path(path).iterdir() if p.is_file())
            for file in files[: len(files) // 2]:
                file.unlink()

        if Path(path).name.startswith("checkpoint-"):
            events.happens("rmtree", half)
        rmtree(path, *args, **options)

    def watched_step(self: Any, *args: Any, **options: Any) -> Any:
        events.happens("step", lambda: None)
        return step(self, *args, **options)

    Path.replace, torch.save, shutil.rmtree = watched_replace, watched_save, watched_rmtree
    torch.optim.AdamW.step = watched_step


def run_child(request: dict[str, Any], answer: int) -> None:
    events = Events(request.get("kill_at"))
    install(events)
    messages: list[str] = []
    config = decode(TrainConfig, request["config"], where="request")
    train(config, on_message=messages.append, progress=False)
    os.write(answer, json.dumps({"events": events.names, "messages": messages}).encode())


def main() -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(read_end)
                # Whatever a library prints must not mix with the answers.
                os.dup2(2, 1)
                run_child(json.loads(line), write_end)
                code = 0
            except BaseException:  # noqa: BLE001  (the parent learns of it by the exit code)
                traceback.print_exc()
            os._exit(code)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
        facts = json.loads(answer) if answer else {}
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **facts}), flush=True)


if __name__ == "__main__":
    main()
