"""ASDiv (Miao et al. 2020): one-step word problems with a short answer, most of them a number with its unit.

`exact` compares the first number of the first line by value; where the answer is a word, the first line itself.
"""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._labels import first_line
from ssmtune.tasks._numbers import first_number, to_value
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import STOPS, SourcedExample


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether the first line gives the number, or the word, and whether it gives the whole answer."""
    line, whole = first_line(text), first_line(example.output)
    expected = to_value(example.facts.get("answer_number") or "")
    right = line == whole if expected is None else first_number(line) == expected
    return {"exact": float(right), "with_unit": float(line == whole)}


def row_of(found: Row) -> Row:
    """Return a row of ours: the source writes a number and its unit in brackets."""
    number, _, unit = found["answer"].partition(" (")
    is_number = to_value(number) is not None
    return {
        "input": f"{found['body']} {found['question']}",
        "target": f"{number} {unit.rstrip(')')}".strip(),
        "answer_number": number if is_number else "",
    }


TASK = SourcedTask(
    name="asdiv",
    version=1,
    kind="math",
    instruction="Answer this problem with the number and its unit only.",
    folder="math_asdiv",
    licence="CC-BY-NC-4.0",
    restriction="non-commercial",
    samples=(
        {"input": "Ada has 3 pens and buys 4. How many has she?", "target": "7 pens", "answer_number": "7"},
        {"input": "Ben is 9 and Eve is 11. Who is older?", "target": "Eve", "answer_number": ""},
    ),
    primary="exact",
    metrics=("exact", "with_unit"),
    chance=0.0,
    stops=(*STOPS, "\nQuestion:", "\nProblem:", "\nQ:"),
    max_new_tokens=32,
    scorer=score,
    hub=Hub(path="EleutherAI/asdiv", revision="refs/convert/parquet", splits={"test": "validation"}, row=row_of),
)
