"""WebNLG (Gardent et al. 2017): triples from DBpedia to text. Official metric: BLEU."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import text_corpus, text_score


def row_of(found: Row) -> Row:
    """Return a row of ours: each triple in brackets."""
    triples = ", ".join(f"({triple})" for triple in found["input"])
    return {"input": triples, "target": found["target"], "references": found["references"] or [found["target"]]}


TASK = SourcedTask(
    name="webnlg",
    version=1,
    kind="text",
    instruction="Say all of these facts in English text.",
    folder="data2text_webnlg",
    licence="CC-BY-NC-SA-4.0",
    restriction="non-commercial, share-alike; rows with a canary stay out of any pretraining text",
    samples=(
        {"input": "(Lake_Mjosa | country | Norway)", "target": "Lake Mjosa is in Norway."},
        {"input": "(Ada_Quist | birthYear | 1901)", "target": "Ada Quist was born in 1901."},
    ),
    primary="chrf",
    metrics=("chrf", "rougeL"),
    max_new_tokens=256,
    scorer=text_score,
    corpus=text_corpus,
    corpus_metrics=("bleu", "chrf"),
    hub=Hub(
        path="GEM/web_nlg",
        config="en",
        revision="refs/convert/parquet",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=row_of,
    ),
)
