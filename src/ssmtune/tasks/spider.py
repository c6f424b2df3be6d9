"""Spider (Yu et al. 2018): a question and the columns of a database to SQL, compared as text.

In the local set the FROM clause is left out of the target, so its queries cannot be run: `exact` is the same parts in the
same order, `overlap` the F1 over parts. `text_to_sql` executes what a model writes.
"""

from __future__ import annotations

from collections import Counter

from ssmtune.tasks._hub import Hub
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._sql import read_sql, tokens
from ssmtune.tasks.base import SourcedExample


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether the statement is one of the references, and the best F1 over its parts."""
    given = tokens(read_sql(text))
    wanted = [tokens(read_sql(reference)) for reference in example.references]
    shared = [2 * sum((Counter(given) & Counter(w)).values()) / (len(given) + len(w)) for w in wanted]
    return {"exact": float(given in wanted), "overlap": max(shared)}


TASK = SourcedTask(
    name="spider",
    version=1,
    kind="sql",
    instruction="Write the SQL query that answers this question from these columns. Answer with the query alone.",
    folder="text2sql_spider",
    licence="CC-BY-SA-4.0",
    restriction="share-alike; rows with a canary stay out of any pretraining text",
    samples=(
        {
            "input": "How many ships are there? | * | ship.ship_id | ship.name | ship.*",
            "target": "select count ( ship.* )",
        },
        {
            "input": "What are the names of the ships? | * | ship.ship_id | ship.name | ship.*",
            "target": "select ship.name",
        },
    ),
    primary="exact",
    metrics=("exact", "overlap"),
    max_new_tokens=160,
    scorer=score,
    test_split="validation",
    hub=Hub(
        path="xlangai/spider",
        splits={"train": "train", "validation": "validation"},
        row=lambda row: {"input": f"{row['question']} | {row['db_id']}", "target": row["query"], "db": row["db_id"]},
    ),
)
