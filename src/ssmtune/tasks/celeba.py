"""CelebA (Liu et al. 2015) as a sequence of pixels: does the face smile? 218 x 178 coloured pixels, averaged to 21 x 17."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._pixels import hub_row, image_reader, locate_images, sample_image
from ssmtune.tasks._sourced import SourcedTask

LABELS = ("no", "yes")
BLOCK = 10

TASK = SourcedTask(
    name="celeba",
    version=1,
    kind="pixels",
    instruction=(
        "Does this face smile? Each point is three characters, its red, green and blue from 0 to f. Answer 'yes' or 'no'."
    ),
    folder="images/celeba*.npz",
    licence="its authors' terms",
    restriction="non-commercial research use",
    samples=(
        {"input": sample_image(["9a9", "a9a", "9f9"], colour=True), "target": "yes"},
        {"input": sample_image(["9a9", "a9a", "959"], colour=True), "target": "no"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=8,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS, positive="yes"),
    corpus_metrics=("readable", "f1"),
    locate=locate_images("celeba*.npz"),
    read=image_reader(BLOCK),
    hub=Hub(
        path="flwrlabs/celeba",
        splits={"train": "train", "validation": "valid", "test": "test"},
        row=hub_row("image", lambda row: "yes" if row["Smiling"] else "no", BLOCK),
    ),
)
