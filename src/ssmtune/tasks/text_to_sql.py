"""Text to SQL by execution: a schema and a question to a SQLite query, run on a small database (Defog's sql-eval).

A query is right when its result is that of any reference: the same rows as often, columns in any order, rows in order
where the reference asks for one. It runs in memory, can only read, and has a time limit.
"""

from __future__ import annotations

from pathlib import Path

from ssmtune.errors import DataError
from ssmtune.tasks._hub import Row
from ssmtune.tasks._sourced import SourcedTask, locate_lines, read_rows
from ssmtune.tasks._sql import is_ordered, read_sql, run_beside, same_result
from ssmtune.tasks.base import SourcedExample

SHIPS = (
    "create table ship (id integer, name text, tons real);\ninsert into ship values (1, 'Ida', 20), (2, 'Rex', 35.5);"
)
SHOWN = "CREATE TABLE ship (\n  id INTEGER,\n  name TEXT,\n  tons REAL\n);\n\n-- "


def score(text: str, example: SourcedExample) -> dict[str, float]:
    """Return whether the result is right, and whether the query ran at all."""
    query = read_sql(text)
    found = (
        run_beside(example.facts["script"], query, [read_sql(r) for r in example.references]).value if query else None
    )
    if not found or "rows" not in found[0]:
        return {"execution": 0.0, "valid": 0.0}
    right = any(
        same_result(found[0]["rows"], answer["rows"], ordered=is_ordered(reference))
        for reference, answer in zip(example.references, found[1:], strict=True)
        if "rows" in answer
    )
    return {"execution": float(right), "valid": 1.0}


def locate(directory: Path, folder: str, split: str) -> tuple[Path, ...]:
    """Return the questions and the databases beside them."""
    lines = locate_lines(directory, folder, split)
    return (*lines, *sorted((lines[0].parent / "databases").glob("*.sql"))) if lines else ()


def read(paths: tuple[Path, ...], split: str) -> list[Row]:
    """Return the rows, each with the script of its database."""
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in paths[1:]}
    rows = read_rows(paths[:1], split)
    for row in rows:
        if row.get("db") not in scripts:
            raise DataError(
                f"{paths[0]}, row {row['id']}: field 'db': got {row.get('db')!r}, and {paths[0].parent / 'databases'} "
                f"holds {sorted(scripts)}. Put the script of that database there as <db>.sql."
            )
        row["script"] = scripts[row["db"]]
    return rows


TASK = SourcedTask(
    name="text_to_sql",
    version=1,
    kind="sql",
    instruction="Write the SQLite query that answers the question. Answer with the query alone.",
    folder="text2sql_defog",
    licence="Apache-2.0",
    restriction="for evaluation only",
    samples=(
        {"input": f"{SHOWN}How many ships are there?", "target": "SELECT count(*) FROM ship;", "script": SHIPS},
        {
            "input": f"{SHOWN}Which ships carry more than 30 tons?",
            "target": "SELECT name FROM ship WHERE tons > 30;",
            "references": ["SELECT name FROM ship WHERE tons > 30;", "SELECT id FROM ship WHERE tons > 30;"],
            "script": SHIPS,
        },
    ),
    primary="execution",
    metrics=("execution", "valid"),
    max_new_tokens=448,
    scorer=score,
    trained=False,
    variation="category",
    locate=locate,
    read=read,
)
