"""GLUE's MNLI (Williams et al. 2018): does a premise entail a hypothesis? Official metric: accuracy, matched genres."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "mnli",
    instruction="Does the premise entail the hypothesis? Answer 'entailment', 'neutral' or 'contradiction'.",
    fields=[("premise", "premise"), ("hypothesis", "hypothesis")],
    labels={name: name for name in ("entailment", "neutral", "contradiction")},
    samples=(
        {"input": "premise: All shops were shut.\nhypothesis: The bakery was shut.", "target": "entailment"},
        {"input": "premise: All shops were shut.\nhypothesis: It was a Sunday.", "target": "neutral"},
        {"input": "premise: All shops were shut.\nhypothesis: The bakery was open.", "target": "contradiction"},
    ),
    licence="OANC, CC-BY-SA-3.0 and CC-BY-3.0 by genre",
    validation="validation_matched",
)
