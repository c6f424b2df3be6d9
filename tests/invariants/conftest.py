"""The micro model and its data, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariants.micro import save_micro_model, write_examples


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
