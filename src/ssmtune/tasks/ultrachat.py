"""UltraChat (Ding et al. 2023), the filtered 200,000: conversations of a language model with itself. For training alone.

Trained on is the last answer of each conversation, behind all turns before it: a row's `turns`, each a role and a content,
ending with the user's; a row without them is a single question.
"""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sourced import SourcedTask, no_score


def row_of(found: Row) -> Row:
    """Return a row of ours: the conversation up to its last answer."""
    turns = [{"role": message["role"], "content": message["content"]} for message in found["messages"]]
    if turns[-1]["role"] == "user":
        turns = turns[:-1]
    return {"input": turns[-2]["content"], "target": turns[-1]["content"], "turns": turns[:-1]}


TASK = SourcedTask(
    name="ultrachat",
    version=1,
    kind="instruction",
    instruction="",
    folder="instruct_ultrachat",
    licence="MIT",
    restriction="answers of a language model, whose maker's terms apply",
    samples=(
        {
            "input": "And in winter?",
            "target": "In winter the lake freezes.",
            "turns": [
                {"role": "user", "content": "Can one swim in the lake?"},
                {"role": "assistant", "content": "In summer, yes."},
                {"role": "user", "content": "And in winter?"},
            ],
        },
        {"input": "Name a colour.", "target": "Blue."},
    ),
    primary="",
    metrics=(),
    max_new_tokens=512,
    scorer=no_score,
    tested=False,
    hub=Hub(path="HuggingFaceH4/ultrachat_200k", splits={"train": "train_sft"}, row=row_of),
)
