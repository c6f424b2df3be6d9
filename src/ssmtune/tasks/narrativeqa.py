"""NarrativeQA (Kocisky et al. 2018): a question about a whole book or film script. Official metric: ROUGE-L.

`f1` counts words as SQuAD does. Texts run to hundreds of thousands of words, and none is cut here: a model reads all of it.
"""

from __future__ import annotations

from ssmtune.tasks._hub import Hub, Row
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._text_metrics import rouge, word_f1
from ssmtune.tasks.base import SourcedExample


def shown(text: str, question: str) -> str:
    """Return the text of a question: the story first, so that what is asked stands next to the answer."""
    return f"{text.strip()}\n\nQuestion: {question.strip()}"


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return ROUGE-L and the F1 over words of the first line, each the best over the references."""
    lines = text.strip().splitlines()
    answer = lines[0] if lines else ""
    return {"rougeL": rouge(answer, example.references)["rougeL"], "f1": word_f1(answer, example.references)}


def row_of(found: Row) -> Row:
    """Return a row of ours."""
    answers = [answer["text"] for answer in found["answers"]]
    text = shown(found["document"]["text"], found["question"]["text"])
    return {"input": text, "target": answers[0], "references": answers}


STORY = "Ida kept a lighthouse. One night she rowed out and saved two men from a wreck. The town gave her a clock."

TASK = SourcedTask(
    name="narrativeqa",
    version=1,
    kind="reading",
    instruction="Answer the question about this story in a few words.",
    folder="long_narrativeqa",
    licence="Apache-2.0 (questions); the stories under their own terms",
    samples=(
        {"input": shown(STORY, "What did the town give Ida?"), "target": "a clock"},
        {"input": shown(STORY, "Whom did she save?"), "target": "two men", "references": ["two men", "men of a wreck"]},
    ),
    primary="rougeL",
    metrics=("rougeL", "f1"),
    max_new_tokens=64,
    scorer=score,
    hub=Hub(
        path="deepmind/narrativeqa",
        splits={"train": "train", "validation": "validation", "test": "test"},
        row=row_of,
    ),
)
