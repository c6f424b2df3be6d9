"""GLUE's SST-2 (Socher et al. 2013): is a sentence about a film positive or negative? Official metric: accuracy."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "sst2",
    instruction="Is this sentence about a film positive or negative? Answer 'positive' or 'negative'.",
    fields=[("sentence", "sentence")],
    labels={"negative": "negative", "positive": "positive"},
    samples=(
        {"input": "a warm and funny surprise from start to end", "target": "positive"},
        {"input": "two hours that feel like five", "target": "negative"},
    ),
    licence="not stated by its authors",
)
