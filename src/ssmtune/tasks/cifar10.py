"""CIFAR-10 (Krizhevsky 2009) as a sequence of pixels: what is shown? 32 x 32 coloured pixels, averaged to 16 x 16."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._pixels import hub_row, image_reader, locate_images, sample_image
from ssmtune.tasks._sourced import SourcedTask

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BLOCK = 2

TASK = SourcedTask(
    name="cifar10",
    version=1,
    kind="pixels",
    instruction=(
        "What is shown here? Each point is three characters, its red, green and blue from 0 to f. Answer with one of: "
        f"{', '.join(LABELS)}."
    ),
    folder="images/cifar10*.npz",
    licence="no formal licence",
    restriction="research use",
    samples=(
        {"input": sample_image(["ccc", "c5c", "222"], colour=True), "target": "ship"},
        {"input": sample_image(["ccc", "ccc", "5c5"], colour=True), "target": "airplane"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=12,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS),
    corpus_metrics=("readable",),
    locate=locate_images("cifar10*.npz"),
    read=image_reader(BLOCK),
    hub=Hub(
        path="uoft-cs/cifar10",
        splits={"train": "train", "test": "test"},
        row=hub_row("img", lambda row: str(row["label"]), BLOCK),
    ),
)
