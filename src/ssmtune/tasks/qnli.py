"""GLUE's QNLI (from SQuAD, Rajpurkar et al. 2016): does a sentence answer a question? Official metric: accuracy."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "qnli",
    instruction="Does the sentence answer the question? Answer 'yes' or 'no'.",
    fields=[("question", "question"), ("sentence", "sentence")],
    labels={"entailment": "yes", "not_entailment": "no"},
    samples=(
        {"input": "question: When was the bridge built?\nsentence: The bridge dates from 1904.", "target": "yes"},
        {"input": "question: When was the bridge built?\nsentence: The bridge is green.", "target": "no"},
    ),
    licence="CC-BY-SA-4.0 (SQuAD); share-alike",
)
