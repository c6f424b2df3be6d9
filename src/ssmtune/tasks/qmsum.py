"""QMSum (Zhong et al. 2021): a question about the transcript of a meeting to a summary. Official metrics: ROUGE.

A transcript is some 10,000 words; it stands before the question. In the local layout it lies in `meetings.jsonl.gz`, a line
a meeting with `context_id` and `turns`, and a row names its meeting by the same `context_id`.
"""

from __future__ import annotations

from pathlib import Path

from ssmtune.data import read_lines, read_object
from ssmtune.errors import DataError
from ssmtune.tasks._hub import Row
from ssmtune.tasks._sourced import SourcedTask, locate_lines, read_rows
from ssmtune.tasks._text_metrics import ROUGE, summary_score


def shown(turns: list[str], question: str) -> str:
    """Return the text of a question: the transcript first, so that what is asked stands next to the answer."""
    return "\n".join(turns) + f"\n\nQuestion: {question}"


def locate(directory: Path, folder: str, split: str) -> tuple[Path, ...]:
    """Return the questions and the transcripts; nothing unless both are there."""
    lines, meetings = (locate_lines(directory, folder, name) for name in (split, "meetings"))
    return (*lines, *meetings) if lines and meetings else ()


def read(paths: tuple[Path, ...], split: str) -> list[Row]:
    """Return the rows, each behind the transcript that it asks about."""
    meetings = {}
    for where, text in read_lines(paths[1]):
        meeting = read_object(text, where)
        meetings[meeting.get("context_id")] = meeting.get("turns")
    rows = read_rows(paths[:1], split)
    for row in rows:
        turns = meetings.get(row.get("context_id"))
        if not isinstance(turns, list):
            raise DataError(
                f"{paths[0]}, row {row['id']}: no meeting {row.get('context_id')!r} with turns is in {paths[1]}."
            )
        row["input"] = shown(turns, row["input"])
    return rows


MEETING = ["Ada: The roof leaks.", "Ben: I will call the roofer.", "Ada: And the gate is to be painted green."]

TASK = SourcedTask(
    name="qmsum",
    version=1,
    kind="summary",
    instruction="Answer the question about this meeting in a few sentences.",
    folder="qmsum",
    licence="MIT",
    samples=(
        {"input": shown(MEETING, "What was said about the roof?"), "target": "It leaks, and Ben will call the roofer."},
        {"input": shown(MEETING, "What about the gate?"), "target": "The gate gets green paint."},
    ),
    primary="rougeL",
    metrics=ROUGE,
    max_new_tokens=800,
    scorer=summary_score,
    variation="kind",
    locate=locate,
    read=read,
)
