"""Recall at growing length: one line among many holds the number that is asked for, at any depth (a needle in hay).

Three other lines of the same form hold other numbers, so that the form alone does not give the answer away.
"""

from __future__ import annotations

import random

from ssmtune.tasks._sequences import SequenceTask

COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "pink")
THINGS = ("boat", "lamp", "horse", "tower", "clock", "bridge", "garden", "kettle")
PLACES = ("the hill", "the lake", "the road", "the mill", "the square", "the wood", "the shore", "the barn")
DOINGS = ("rain fell on", "wind came over", "snow lay on", "birds flew to", "people met at", "sun shone on")
NUM_NEEDLES = 4


def draw(length: int, rng: random.Random) -> tuple[str, str]:
    """Return `length` lines with four numbers among them and the question for one of these."""
    names = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], NUM_NEEDLES)
    codes = rng.sample(range(1000, 10_000), NUM_NEEDLES)
    lines = [f"On day {i + 1} {rng.choice(DOINGS)} {rng.choice(PLACES)}." for i in range(length)]
    for place, name, code in zip(rng.sample(range(length), NUM_NEEDLES), names, codes, strict=True):
        lines[place] = f"The code of the {name} is {code}."
    asked = rng.randrange(NUM_NEEDLES)
    return "\n".join(lines) + f"\n\nWhat is the code of the {names[asked]}?", str(codes[asked])


TASK = SequenceTask(
    name="needle",
    version=1,
    instruction="Read the text and answer the question at its end with the number only.",
    train_lengths=(8, 12, 16, 24, 32),
    test_lengths=(16, 32, 64, 128, 256, 512),
    num_train=10_000,
    num_test=50,
    max_new_tokens=8,
    draw=draw,
    chance=1 / NUM_NEEDLES,
)
