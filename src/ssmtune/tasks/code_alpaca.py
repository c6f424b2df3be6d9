"""CodeAlpaca (Chaudhary 2023): instructions about code with answers of a language model. For training alone."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._sourced import SourcedTask, no_score

TASK = SourcedTask(
    name="code_alpaca",
    version=1,
    kind="instruction",
    instruction="",
    folder="instruct_code_alpaca",
    licence="CC-BY-4.0",
    restriction="answers of a language model, whose maker's terms apply",
    samples=(
        {"input": "Write a Python line that reverses the list xs.", "target": "xs.reverse()"},
        {"input": "What does len('abc') give?", "target": "3"},
    ),
    primary="",
    metrics=(),
    max_new_tokens=512,
    scorer=no_score,
    tested=False,
    hub=Hub(
        path="sahil2801/CodeAlpaca-20k",
        splits={"train": "train"},
        row=lambda row: {
            "input": f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"],
            "target": row["output"],
        },
    ),
)
