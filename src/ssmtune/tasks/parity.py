"""Parity: is the number of ones in a row of bits even or odd? Needs one bit of state, at any length."""

from __future__ import annotations

import random

from ssmtune.tasks._sequences import SequenceTask


def draw(length: int, rng: random.Random) -> tuple[str, str]:
    """Return `length` random bits and the parity of their sum."""
    bits = [rng.randrange(2) for _ in range(length)]
    return " ".join(map(str, bits)), ("even", "odd")[sum(bits) % 2]


TASK = SequenceTask(
    name="parity",
    version=1,
    instruction="Is the number of ones even or odd? Answer 'even' or 'odd'.",
    train_lengths=(16, 20, 24, 28, 32),
    test_lengths=(16, 32, 64, 128, 256),
    num_train=20_000,
    num_test=100,
    max_new_tokens=8,
    draw=draw,
    chance=0.5,
)
