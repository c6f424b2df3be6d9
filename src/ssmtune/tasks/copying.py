"""Copying: write a row of letters again. Tests what a state of fixed size can hold."""

from __future__ import annotations

import random
import string

from ssmtune.tasks._sequences import SequenceTask


def draw(length: int, rng: random.Random) -> tuple[str, str]:
    """Return `length` random letters, and the same."""
    letters = " ".join(rng.choices(string.ascii_lowercase, k=length))
    return letters, letters


TASK = SequenceTask(
    name="copying",
    version=1,
    instruction="Write these letters again.",
    train_lengths=(8, 12, 16, 20, 24),
    test_lengths=(8, 16, 24, 48, 96),
    num_train=20_000,
    num_test=100,
    max_new_tokens=208,
    draw=draw,
    chance=0.0,
)
