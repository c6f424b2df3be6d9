"""Sentiment of a sentence of a film review, positive or negative, in the manner of SST (Pang and Lee 2005)."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._sourced import SourcedTask

LABELS = ("positive", "negative")

TASK = SourcedTask(
    name="sentiment",
    version=1,
    kind="classification",
    instruction="Is this sentence of a film review positive or negative? Answer 'positive' or 'negative'.",
    folder="sentiment",
    licence="MIT (the ratings); the sentences are from film reviews",
    samples=(
        {"input": "The cast is a joy, and the ending earns its tears.", "target": "positive"},
        {"input": "The jokes were old when the projector was new.", "target": "negative"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=16,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS, positive="positive"),
    corpus_metrics=("readable", "f1"),
    hub=Hub(
        path="cornell-movie-review-data/rotten_tomatoes",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=lambda row: {"input": row["text"], "target": {"pos": "positive", "neg": "negative"}[row["label"]]},
    ),
)
