"""GLUE's WNLI (Levesque et al. 2012): does a sentence with its pronoun replaced follow? Official metric: accuracy.

Its validation split repeats sentences of the training split with the other label, so learning lowers the score: read it
beside the share of the commonest label.
"""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "wnli",
    instruction="Does the second sentence follow from the first? Answer 'yes' or 'no'.",
    fields=[("sentence1", "first"), ("sentence2", "second")],
    labels={"not_entailment": "no", "entailment": "yes"},
    samples=(
        {
            "input": "first: The cup fell on the tile and it broke.\nsecond: The cup broke.",
            "target": "yes",
        },
        {
            "input": "first: The cup fell on the tile and it broke.\nsecond: The tile broke.",
            "target": "no",
        },
    ),
    licence="CC-BY-4.0",
)
