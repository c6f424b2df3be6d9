"""SAMSum (Gliwa et al. 2019): a chat to a summary. Official metrics: ROUGE-1, -2 and -L."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import ROUGE, summary_score

TASK = SourcedTask(
    name="samsum",
    version=1,
    kind="summary",
    instruction="Summarise this chat in one to three sentences.",
    folder="summ_samsum",
    licence="CC-BY-NC-ND-4.0",
    restriction="non-commercial, no derivatives",
    samples=(
        {"input": "Ada: Lunch at noon?\nBen: Fine, the usual place.", "target": "Ada and Ben will have lunch at noon."},
        {"input": "Eve: The train is late.\nDan: I will wait.", "target": "Dan waits for Eve, whose train is late."},
    ),
    primary="rougeL",
    metrics=ROUGE,
    max_new_tokens=160,
    scorer=summary_score,
    hub=Hub(
        path="knkarthick/samsum",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=lambda row: {"input": row["dialogue"], "target": row["summary"]},
    ),
)
