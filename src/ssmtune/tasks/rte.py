"""GLUE's RTE (Dagan et al. 2006 and later rounds): does a text entail a sentence? Official metric: accuracy."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "rte",
    instruction="Does the text entail the sentence? Answer 'yes' or 'no'.",
    fields=[("sentence1", "text"), ("sentence2", "sentence")],
    labels={"entailment": "yes", "not_entailment": "no"},
    samples=(
        {"input": "text: Ada moved to Oslo in May.\nsentence: Ada lives in Oslo.", "target": "yes"},
        {"input": "text: Ada moved to Oslo in May.\nsentence: Ada was born in Oslo.", "target": "no"},
    ),
    licence="not stated by its authors",
)
