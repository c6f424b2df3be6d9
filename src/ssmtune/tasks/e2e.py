"""E2E (Novikova et al. 2017): attributes of a restaurant to a sentence. Official metrics: BLEU and others."""

from __future__ import annotations

import re

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import text_corpus, text_score


def row_of(found: Row) -> Row:
    """Return a row of ours: `name[X], food[Y]` becomes `name: X, food: Y`."""
    shown = re.sub(r"(\w[\w ]*)\[([^\]]*)\]", r"\1: \2", found["meaning_representation"])
    return {"input": shown, "target": found["target"], "references": found["references"] or [found["target"]]}


TASK = SourcedTask(
    name="e2e",
    version=1,
    kind="text",
    instruction="Describe this place in a sentence that says all of its attributes.",
    folder="data2text_e2e",
    licence="CC-BY-SA-4.0",
    restriction="share-alike",
    samples=(
        {"input": "name: The Kiln, food: Thai, area: harbour", "target": "The Kiln serves Thai food at the harbour."},
        {"input": "name: Blue Door, Type: pub", "target": "Blue Door is a pub."},
    ),
    primary="chrf",
    metrics=("chrf", "rougeL"),
    max_new_tokens=192,
    scorer=text_score,
    corpus=text_corpus,
    corpus_metrics=("bleu", "chrf"),
    hub=Hub(
        path="GEM/e2e_nlg",
        revision="refs/convert/parquet",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=row_of,
    ),
)
