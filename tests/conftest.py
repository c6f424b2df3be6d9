"""Settings of every test: no network, and one thread, so that sums have one order."""

from __future__ import annotations

import os

# Set before torch or huggingface_hub is imported: both read them on import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels are tested in Triton's interpreter, which has to be chosen before anything imports Triton; on a GPU set it to 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The order of a sum depends on the number of threads, and bitwise tests compare processes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN, so that an element that nobody writes shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


THIRD_PARTY_WARNINGS = (
    # PEFT 0.21 asks the model by the name that transformers 5.23 renamed; the two releases only meet in a later PEFT.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
"""Warnings that other packages raise about one another: nothing here can act on them. All others are errors."""


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
