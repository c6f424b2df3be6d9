"""GLUE's MRPC (Dolan and Brockett 2005): do two sentences say the same? Official metrics: F1 and accuracy."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "mrpc",
    instruction="Do these two sentences say the same? Answer 'yes' or 'no'.",
    fields=[("sentence1", "first"), ("sentence2", "second")],
    labels={"not_equivalent": "no", "equivalent": "yes"},
    samples=(
        {"input": "first: The firm cut 40 jobs.\nsecond: Forty jobs were cut by the firm.", "target": "yes"},
        {"input": "first: The firm cut 40 jobs.\nsecond: The firm hired 40 people.", "target": "no"},
    ),
    licence="Microsoft's terms for the corpus; research use",
    positive="yes",
)
