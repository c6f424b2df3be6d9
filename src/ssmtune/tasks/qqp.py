"""GLUE's QQP: do two questions ask the same? Official metrics: F1 and accuracy."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "qqp",
    instruction="Do these two questions ask the same? Answer 'yes' or 'no'.",
    fields=[("question1", "first"), ("question2", "second")],
    labels={"not_duplicate": "no", "duplicate": "yes"},
    samples=(
        {"input": "first: How do I boil an egg?\nsecond: What is the way to boil an egg?", "target": "yes"},
        {"input": "first: How do I boil an egg?\nsecond: How do I paint an egg?", "target": "no"},
    ),
    licence="Quora's terms of service; non-commercial",
    positive="yes",
)
