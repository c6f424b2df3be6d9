"""What a task is, how one is found, and how its examples are split, shown to a model and kept apart.

A task is one file in this folder, found by its file name, that exposes a module constant `TASK`.
Files whose name starts with an underscore serve the tasks and are none themselves.
Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from ssmtune.discovery import module_names
from ssmtune.errors import ConfigError, nearest

STOPS = ("<|end_of_text|>", "<|start_of_role|>")
"""A turn is over at the first of these; what a model writes after it is not part of its answer."""

TEST_SHARE = 10
"""One example in this many is held out."""

Side = Literal["train", "test"]

Kind = Literal[
    "tables", "classification", "regression", "text", "summary", "sql", "math", "code", "reading", "pixels", "sequence",
    "instruction",
]  # fmt: skip

SHINGLE_WORDS = 3

NEAR_DUPLICATE = 0.5
"""Two inputs of one schema are near-duplicates when the Jaccard index of their word 3-shingles is at least this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its answer; `schema` and `variation` say where it comes from; no model is shown them."""

    id: str
    instruction: str
    input: str
    output: str
    schema: str
    variation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourcedExample(Example):
    """An example of a published set; `facts` are the row's other fields, for the scorer: no model is shown them."""

    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        """Every right answer: those that the row lists, else its one."""
        return list(self.facts.get("references") or [self.output])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Examples to train on and examples held out, disjoint."""

    train: list[Example]
    test: list[Example]


@runtime_checkable
class Task(Protocol):
    """What `TASK` of a task file answers to, beside one of the two ways below to get at its examples."""

    @property
    def name(self) -> str:
        """The file name without its ending."""

    @property
    def kind(self) -> Kind:
        """What sort of task it is."""

    @property
    def version(self) -> int:
        """Raised when examples or scores change: figures of two versions are not comparable."""

    @property
    def primary(self) -> str:
        """The metric that comparisons are made on."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys of what `score` returns, each a value from 0 to 1."""

    @property
    def chance(self) -> float | None:
        """What guessing among the possible answers gives on `primary`; None where there is no such guess."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer; `STOPS` are among them."""

    @property
    def max_new_tokens(self) -> int:
        """Enough for every right answer at about two bytes a token."""

    @property
    def licence(self) -> str:
        """Under what terms the examples may be used."""

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return every metric for what a model wrote; never raises on malformed text."""


@runtime_checkable
class GeneratedTask(Task, Protocol):
    """A task that draws its examples; `split` divides them."""

    @property
    def full_size(self) -> int:
        """How many examples there are at size 1."""

    def generate(self, size: float, seed: int) -> list[Example]:
        """Return `round(size * full_size)` examples, always the same for the same arguments."""


@runtime_checkable
class SidedTask(Task, Protocol):
    """A task whose two sides are given: by files, by a set on a hub, or by lengths to train on and longer ones to test."""

    def examples(self, side: Side, size: float, directory: str | None) -> Sequence[Example]:
        """Return the examples of one side, in an order that makes every prefix a fair sample.

        `size` is the share of the training side; the test side is always whole.
        `directory` is where sets lie, the word "hub" to have `datasets` fetch them, or None for `SSMTUNE_DATA`.
        Raises `DataError` saying how to get a set that is not there.
        """

    def sources(self, side: Side, directory: str | None) -> dict[str, str]:
        """Return digests of what `examples` reads, by name; empty for a task that draws its examples."""

    def sample_examples(self) -> Sequence[Example]:
        """Return two or more invented examples with different answers: what a question looks like, without any set."""


def task_names() -> tuple[str, ...]:
    """Return the names of the tasks of this folder, sorted, without importing them."""
    return module_names("ssmtune.tasks")


def get_task(name: str) -> Task:
    """Return the task of a file in this folder, or of a third party named as `their.module:NAME`.

    Raises `ConfigError` naming the nearest task when there is none of that name.
    """
    module_name, _, constant = name.partition(":")
    if not constant:
        if name not in task_names():
            raise ConfigError(
                f"task: got {name!r}; {nearest(name, task_names())}. A task of your own is 'module:NAME'."
            )
        module_name, constant = f"ssmtune.tasks.{name}", "TASK"
    try:
        task = vars(importlib.import_module(module_name)).get(constant)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task: got {name!r}, but module {error.name!r} cannot be found. Check its name and PYTHONPATH."
        ) from None
    if not isinstance(task, Task) or not isinstance(task, (GeneratedTask, SidedTask)):
        raise ConfigError(
            f"task: got {name!r}, but {module_name} holds no task named {constant!r}. "
            "It must answer to GeneratedTask or SidedTask of ssmtune.tasks.base."
        )
    return task


def split(examples: Sequence[Example], seed: int = 42) -> Split:
    """Return a 90/10 split (test rounded up), a function of the order of `examples` and of `seed` alone.

    Both parts are in random order, so a prefix of either is a fair sample.
    """
    shuffled = list(examples)
    random.Random(f"split:{seed}").shuffle(shuffled)
    num_test = -(-len(shuffled) // TEST_SHARE)
    return Split(train=shuffled[num_test:], test=shuffled[:num_test])


def messages(example: Example) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the messages that ask the question and those that answer it, for a tokenizer's chat template."""
    answer = [{"role": "assistant", "content": example.output}]
    if isinstance(example, SourcedExample) and example.facts.get("turns"):
        return list(example.facts["turns"]), answer
    content = f"{example.instruction}\n\n{example.input}" if example.instruction else example.input
    return [{"role": "user", "content": content}], answer


def with_shots(prompt: Sequence[dict[str, str]], shots: Sequence[Example]) -> list[dict[str, str]]:
    """Return `prompt` behind the solved examples `shots`, each a turn of the user's and one of the model's."""
    return [*(message for shot in shots for part in messages(shot) for message in part), *prompt]


def sample_examples(task: Task) -> Sequence[Example]:
    """Return two or more examples of a task with different answers, whether or not its data are there."""
    if isinstance(task, GeneratedTask):
        return task.generate(2 / task.full_size, seed=0)[:2]
    assert isinstance(task, SidedTask)
    return task.sample_examples()


def stop_text(completion: str, stops: Sequence[str] = STOPS) -> str:
    """Return the part of `completion` before the first stop string: all of it when there is none.

    >>> stop_text("jira_issues<|end_of_text|>jira_boards")
    'jira_issues'
    """
    ends = [completion.find(stop) for stop in stops]
    return completion[: min((end for end in ends if end >= 0), default=len(completion))]


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the set of runs of three words of `text`, lower-cased; a text of fewer words is one run."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(*(words[i:] for i in range(SHINGLE_WORDS)), strict=False)) or frozenset([tuple(words)])


def similarity(left: frozenset[tuple[str, ...]], right: frozenset[tuple[str, ...]]) -> float:
    """Return the Jaccard index of two sets of shingles."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def near_duplicates(
    train: Sequence[Example], test: Sequence[Example], bound: float = NEAR_DUPLICATE
) -> list[tuple[Example, Example, float]]:
    """Return every (train, test, similarity) of one schema whose inputs are at least `bound` alike.

    Only examples of one schema are compared: inputs of two schemas have different answers, so neither leaks the other.
    That also makes the comparison exact and fast, a few hundred thousand set operations for 24,000 examples.
    """
    seen: dict[str, list[tuple[Example, frozenset[tuple[str, ...]]]]] = defaultdict(list)
    for example in train:
        seen[example.schema].append((example, shingles(example.input)))
    found = []
    for example in test:
        own = shingles(example.input)
        for other, theirs in seen[example.schema]:
            alike = similarity(own, theirs)
            if alike >= bound:
                found.append((other, example, alike))
    return found
