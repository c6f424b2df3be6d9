"""Long documents: is a mail spam? Bodies of up to 32,000 characters, headers removed (SpamAssassin's public corpus)."""

from __future__ import annotations

from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._sourced import SourcedTask

LABELS = ("ham", "spam")

TASK = SourcedTask(
    name="spam",
    version=1,
    kind="reading",
    instruction="Is this mail spam, or ham (wanted mail)? Answer 'spam' or 'ham'.",
    folder="spam",
    licence="PDDL-1.0 / CC0-1.0 as its packager declares",
    restriction="mails of third parties",
    samples=(
        {"input": "Hi Ada,\nthe minutes of Tuesday are on the wiki.\nBen", "target": "ham"},
        {"input": "WINNER!!! Claim your prize of $1,000,000 today.", "target": "spam"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=16,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS, positive="spam"),
    corpus_metrics=("readable", "f1"),
)
