"""GSM8K (Cobbe et al. 2021): word problems of school, solved in steps, the answer behind `####`.

The answer is the number behind the *first* marker: what a model writes after it (further problems, another marker) is not
part of its answer. `last_number` takes the last number before that where there is no marker, and so measures the sum
without the form; `marked` is the share of answers that have one.
"""

from __future__ import annotations

import re

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._numbers import first_number, last_number, to_value
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import STOPS, SourcedExample

MARKER = "####"


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether the marked number is right, whether the number is right with or without a marker, and if it is marked."""
    expected = to_value(example.facts.get("answer_number") or example.output.rpartition(MARKER)[2])
    steps, marker, rest = text.partition(MARKER)
    marked = first_number(rest.partition("\n")[0]) if marker else None
    loose = marked if marked is not None else last_number(steps)
    return {
        "exact": float(marked is not None and marked == expected),
        "last_number": float(loose is not None and loose == expected),
        "marked": float(marked is not None),
    }


def row_of(found: Row) -> Row:
    """Return a row of ours."""
    return {
        "input": found["question"],
        "target": found["answer"],
        "answer_number": re.sub(r"[,$\s]", "", found["answer"].rpartition(MARKER)[2]),
    }


TASK = SourcedTask(
    name="gsm8k",
    version=1,
    kind="math",
    instruction="Solve this problem step by step. End with '#### ' and the number that is the answer.",
    folder="math_gsm8k",
    licence="MIT",
    samples=(
        {
            "input": "Ada picks 12 pears and gives away 5. How many does she keep?",
            "target": "She keeps 12 - 5 = <<12-5=7>>7 pears.\n#### 7",
            "answer_number": "7",
        },
        {
            "input": "A crate holds 250 nails. How many nails do 4 crates hold?",
            "target": "4 crates hold 4 * 250 = <<4*250=1000>>1000 nails.\n#### 1000",
            "answer_number": "1000",
        },
    ),
    primary="exact",
    metrics=("exact", "last_number", "marked"),
    chance=0.0,
    stops=(*STOPS, "\nQuestion:", "\nProblem:", "\nQ:"),
    max_new_tokens=640,
    scorer=score,
    hub=Hub(path="openai/gsm8k", config="main", splits={"train": "train", "test": "test"}, row=row_of),
)
