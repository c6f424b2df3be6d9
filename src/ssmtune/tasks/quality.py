"""QuALITY (Pang et al. 2022): a question with four answers about an article of some 5,000 words. Official: accuracy."""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._labels import METRICS, label_corpus, label_scorer
from ssmtune.tasks._sourced import SourcedTask

LABELS = ("A", "B", "C", "D")


def shown(article: str, question: str, options: list[str]) -> str:
    """Return the text of a question: the article first, so that what is asked stands next to the answer."""
    choices = "\n".join(f"{label}. {option}" for label, option in zip(LABELS, options, strict=True))
    return f"{article.strip()}\n\nQuestion: {question.strip()}\n{choices}"


def row_of(found: Row) -> Row:
    """Return a row of ours."""
    text = shown(found["article"], found["question"], found["options"])
    return {"input": text, "target": LABELS[found["answer"]], "hard": found["hard"]}


SHORT = "The harbour froze in January. Ida walked to the ship over the ice."

TASK = SourcedTask(
    name="quality",
    version=1,
    kind="reading",
    instruction="Read the article and answer the question with the letter of the right answer: A, B, C or D.",
    folder="long_quality",
    licence="CC-BY-4.0 (questions); articles under their own terms",
    samples=(
        {"input": shown(SHORT, "How did Ida get there?", ["By boat", "On foot", "By train", "By car"]), "target": "B"},
        {"input": shown(SHORT, "When was it?", ["January", "May", "June", "July"]), "target": "A"},
    ),
    primary="accuracy",
    metrics=METRICS,
    chance=1 / len(LABELS),
    max_new_tokens=8,
    scorer=label_scorer(LABELS),
    corpus=label_corpus(LABELS),
    corpus_metrics=("readable",),
    test_split="validation",
    variation="hard",
    hub=Hub(path="emozilla/quality", splits={"train": "train", "validation": "validation"}, row=row_of),
)
