"""GLUE's CoLA (Warstadt et al. 2018): is a sentence acceptable English? Official metric: the Matthews correlation."""

from __future__ import annotations

from ssmtune.tasks._glue import glue_task

TASK = glue_task(
    "cola",
    instruction="Is this sentence acceptable English? Answer 'acceptable' or 'unacceptable'.",
    fields=[("sentence", "sentence")],
    labels={"unacceptable": "unacceptable", "acceptable": "acceptable"},
    samples=(
        {"input": "The lamp stood near the window all winter.", "target": "acceptable"},
        {"input": "The lamp near stood winter window all the.", "target": "unacceptable"},
    ),
    licence="not stated by its authors",
    correlation=True,
)
