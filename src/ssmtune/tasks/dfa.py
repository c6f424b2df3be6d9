"""A finite automaton of four states over three letters: in which state does a word end? Two letters permute, one resets."""

from __future__ import annotations

import random

from ssmtune.tasks._sequences import SequenceTask

MOVES = {"a": (1, 2, 3, 0), "b": (1, 0, 2, 3), "c": (0, 0, 2, 2)}
"""State after each letter, by the state before it: a cycle, a swap, and a merge, so that the states do not all stay apart."""

TABLE = "; ".join(f"{letter}: " + " ".join(f"{i}>{j}" for i, j in enumerate(to)) for letter, to in MOVES.items())


def draw(length: int, rng: random.Random) -> tuple[str, str]:
    """Return a random word of `length` letters and the state that it leads to from state 0."""
    word = rng.choices("abc", weights=(4, 4, 1), k=length)
    state = 0
    for letter in word:
        state = MOVES[letter][state]
    return " ".join(word), str(state)


TASK = SequenceTask(
    name="dfa",
    version=1,
    instruction=f"Start in state 0 and follow the moves ({TABLE}). Answer with the last state.",
    train_lengths=(16, 24, 32, 48, 64),
    test_lengths=(64, 128, 256, 512),
    num_train=20_000,
    num_test=100,
    max_new_tokens=8,
    draw=draw,
    chance=0.25,
)
