"""XSum (Narayan et al. 2018): a news article to one sentence. Official metrics: ROUGE-1, -2 and -L."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import ROUGE, summary_score

TASK = SourcedTask(
    name="xsum",
    version=1,
    kind="summary",
    instruction="Summarise this article in one sentence.",
    folder="summ_xsum",
    licence="MIT (the set); the articles are the BBC's",
    restriction="research use; rows with a canary stay out of any pretraining text",
    samples=(
        {
            "input": "The ferry to the island ran again on Monday after repairs that took nine days.",
            "target": "An island's ferry is back after nine days of repairs.",
        },
        {
            "input": "Two schools in the valley will share a new hall from next autumn, the council said.",
            "target": "Two valley schools are to get a shared hall.",
        },
    ),
    primary="rougeL",
    metrics=ROUGE,
    max_new_tokens=136,
    scorer=summary_score,
    hub=Hub(
        path="EdinburghNLP/xsum",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=lambda row: {"input": row["document"], "target": row["summary"]},
    ),
)
