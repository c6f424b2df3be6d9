"""MNIST (LeCun et al. 1998) as a sequence of pixels: which digit is it? 28 x 28 grey pixels, averaged to 14 x 14."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._pixels import hub_row, image_reader, locate_images, sample_image
from ssmtune.tasks._sourced import SourcedTask

LABELS = tuple("0123456789")
BLOCK = 2
ONE = ["00000", "00f00", "00f00", "00f00", "00000"]
SEVEN = ["00000", "0fff0", "000f0", "00f00", "00000"]

TASK = SourcedTask(
    name="mnist",
    version=1,
    kind="pixels",
    instruction="Which digit is drawn here? Each character is the brightness of a point, from 0 to f. Answer with the digit.",
    folder="images/mnist*.npz",
    licence="CC-BY-SA-3.0",
    restriction="share-alike",
    samples=(
        {"input": sample_image(ONE, colour=False), "target": "1"},
        {"input": sample_image(SEVEN, colour=False), "target": "7"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=8,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS),
    corpus_metrics=("readable",),
    locate=locate_images("mnist*.npz"),
    read=image_reader(BLOCK),
    hub=Hub(
        path="ylecun/mnist",
        splits={"train": "train", "test": "test"},
        row=hub_row("image", lambda row: str(row["label"]), BLOCK),
    ),
)
