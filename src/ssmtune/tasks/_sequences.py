"""Tasks drawn from a rule at any length: trained on short questions, tested on the same and on longer ones.

A longer question is another `variation`, so a record tells the scores by length. No question of a test side is ever one of
the training side.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from ssmtune.tasks.base import STOPS, Example, Kind, Side, stop_text

LICENCE = "ours"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceTask:
    """A rule: `draw` returns a question of about `length` and its answer.

    `exact` is whether the first line is the answer, `prefix` the share of its words that are right from the start.
    """

    name: str
    version: int
    instruction: str
    train_lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    num_train: int
    num_test: int
    max_new_tokens: int
    draw: Callable[[int, random.Random], tuple[str, str]]
    chance: float
    kind: Kind = "sequence"
    primary: str = "exact"
    metrics: tuple[str, ...] = ("exact", "prefix")
    stops: tuple[str, ...] = STOPS
    licence: str = LICENCE

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return whether the first line is the answer, and how much of it is right from the start."""
        lines = stop_text(completion, self.stops).strip().splitlines()
        given, expected = (lines[0].split() if lines else []), example.output.split()
        wrong = next((i for i, word in enumerate(expected) if given[i : i + 1] != [word]), len(expected))
        return {"exact": float(given == expected), "prefix": wrong / len(expected)}

    def examples(self, side: Side, size: float, directory: str | None) -> list[Example]:
        """Return one side: `num_train` examples times `size`, or `num_test` of each length; `directory` is not used."""
        held_out = self._drawn("test", self.test_lengths, self.num_test * len(self.test_lengths), frozenset())
        if side == "test":
            return held_out
        asked = frozenset(example.input for example in held_out)
        return self._drawn("train", self.train_lengths, max(1, round(size * self.num_train)), asked)

    def sources(self, side: Side, directory: str | None) -> dict[str, str]:
        """Return nothing: the examples are a function of the version alone."""
        return {}

    def sample_examples(self) -> list[Example]:
        """Return two short examples with different answers."""
        found = self._drawn("sample", self.train_lengths, 32, frozenset())
        return [found[0], next(e for e in found if e.output.split()[0] != found[0].output.split()[0])]

    def _drawn(self, side: str, lengths: Sequence[int], num: int, without: frozenset[str]) -> list[Example]:
        """`num` examples, lengths dealt out in turn, so that every prefix holds all of them."""
        found: list[Example] = []
        for number in range(num):
            length, attempt = lengths[number % len(lengths)], 0
            while True:
                rng = random.Random(f"{self.name}:{self.version}:{side}:{number}:{attempt}")
                source, target = self.draw(length, rng)
                if source not in without:
                    break
                attempt += 1
            name = f"length-{length:05d}"
            found.append(
                Example(
                    id=f"{self.name}-{side}-{number:05d}",
                    instruction=self.instruction,
                    input=source,
                    output=target,
                    schema=self.name,
                    variation=name,
                )
            )
        return found
