"""The micro model and its data, saved once, and the process in whose children runs are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from invariants.micro import save_micro_model, write_examples

Runner = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a saved micro model with tokenizer and chat template."""
    return save_micro_model(tmp_path_factory.mktemp("micro-model"))


@pytest.fixture(scope="session")
def micro_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with train.jsonl (20 examples) and validation.jsonl (4 examples)."""
    directory = tmp_path_factory.mktemp("micro-data")
    write_examples(directory / "train.jsonl")
    write_examples(directory / "validation.jsonl", num=4, seed=1)
    return directory


@pytest.fixture(scope="session")
def run_child() -> Iterator[Runner]:
    """Ask the process in killable.py to train in a child of its own."""
    script = Path(__file__).with_name("killable.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    assert json.loads(process.stdout.readline()) == "ready"

    def ask(config: dict[str, Any], kill_at: int | None = None) -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"config": config, "kill_at": kill_at}) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    yield ask
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()
    process.stderr.close()
