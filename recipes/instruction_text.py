"""Write chat-formatted pretraining text made from the documentation of schemas: questions, answers and small writing
exercises.

Usage: python recipes/instruction_text.py --schemas SCHEMAS.jsonl.gz --out instruction.jsonl

Each line is {"messages": [...]}: one to three turns about one table (what a column holds, its type, which columns there
are) or an exercise (write JSON with given keys, copy, sort or count words).
Nothing here has the form of a task: no table is named from its headers, no header is mapped, no rule is written.
The text is a pure function of the input file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCUMENTS_PER_SCHEMA = 4
EXERCISES_PER_SCHEMA = 2
MAX_LISTED = 16
MAX_DESCRIPTION_CHARS = 240

Turn = tuple[str, str]

PLAIN_WORDS = (
    "apple anchor bridge candle desert engine forest garden harbor island jacket kettle ladder market needle "
    "orange paper "
    "quarry river saddle table umbrella valley window yellow zebra blanket copper drawer feather glove hammer "
    "ink jar lantern"
).split()


def read_schemas(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the gzipped JSON-lines file `path`, sorted by id."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return sorted((json.loads(line) for line in stream), key=lambda row: str(row["id"]))


def documents(schema: dict[str, Any]) -> list[list[Turn]]:
    """Return the conversations made from one schema, always the same for the same row."""
    rng = random.Random(f"instruction:{schema['id']}")
    result = []
    for _ in range(DOCUMENTS_PER_SCHEMA):
        turns = [rng.choice(QUESTIONS)(schema, rng) for _ in range(rng.randint(1, 3))]
        # The same question twice in a conversation teaches nothing.
        result.append(list(dict(turns).items()))
    return result + [[rng.choice(EXERCISES)(schema, rng)] for _ in range(EXERCISES_PER_SCHEMA)]


def spoken(schema: dict[str, Any]) -> str:
    """Return the name of a table in words: `work item of omics`."""
    return f"{schema['name'].replace('_', ' ')} of {schema['domain'].replace('_', ' ').replace('-', ' ')}"


def described(schema: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (column, first sentences of its description) of the columns that have a description of some substance."""
    result = []
    for column in schema["columns"]:
        text = re.sub(r"<[^>]+>|\s+", " ", str(column.get("description") or "")).strip()
        if len(text) > MAX_DESCRIPTION_CHARS:
            text = text[:MAX_DESCRIPTION_CHARS].rpartition(". ")[0]
        # A text cut inside a parenthesis is no sentence.
        if len(text) >= 12 and text.count("(") == text.count(")"):
            result.append((str(column["column"]), text.rstrip(".") + "."))
    return result


def ask_meaning(schema: dict[str, Any], rng: random.Random) -> Turn:
    """What one column holds, answered with its description."""
    known = described(schema)
    if not known:
        return ask_type(schema, rng)
    column, text = rng.choice(known)
    question = rng.choice(
        (
            f"What does the column {column} of {spoken(schema)} hold?",
            f"Explain the field {column} in {spoken(schema)}.",
            f"In {spoken(schema)}, what is {column}?",
            f"Describe {column} ({spoken(schema)}).",
        )
    )
    return question, text


def ask_type(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Which type one column has."""
    column = rng.choice(schema["columns"])
    name, kind = column["column"], column["type"]
    question = rng.choice(
        (
            f"Which type does {name} of {spoken(schema)} have?",
            f"What is the data type of {name} in {spoken(schema)}?",
        )
    )
    return question, rng.choice(
        (f"{name} is of type {kind}.", f"It is {'an' if kind[0] in 'aeiou' else 'a'} {kind}.", kind)
    )


def ask_columns(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Which columns a table has, as prose, as a list or as JSON."""
    names = [column["column"] for column in schema["columns"]][:MAX_LISTED]
    whole = "" if len(schema["columns"]) <= MAX_LISTED else f"the first {MAX_LISTED} "
    kind = rng.choice(("as a JSON array", "one per line", "separated by commas"))
    answer = {
        "as a JSON array": json.dumps(names),
        "one per line": "\n".join(names),
        "separated by commas": ", ".join(names),
    }
    return f"List {whole or 'the '}columns of {spoken(schema)}, {kind}.", answer[kind]


def ask_columns_of_type(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Which columns of a table have a given type."""
    kind = rng.choice(sorted({column["type"] for column in schema["columns"]} - {"string"}) or ["boolean"])
    names = [column["column"] for column in schema["columns"] if column["type"] == kind][:MAX_LISTED]
    return f"Which columns of {spoken(schema)} are of type {kind}?", ", ".join(names) or "None of them."


def ask_by_description(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Which of a few columns a description belongs to."""
    known = described(schema)
    if len(known) < 4:
        return ask_type(schema, rng)
    offered = rng.sample(known, 4)
    column, text = rng.choice(offered)
    return f"Which of these columns is described as: {text}\n" + ", ".join(name for name, _ in offered), column


def ask_json_description(schema: dict[str, Any], rng: random.Random) -> Turn:
    """A JSON object with name, type and description of one column."""
    column, text = rng.choice(described(schema) or [(str(schema["columns"][0]["column"]), "Not documented.")])
    (kind,) = {c["type"] for c in schema["columns"] if c["column"] == column}
    answer = json.dumps({"name": column, "type": kind, "description": text}, ensure_ascii=False)
    return f"Document {column} of {spoken(schema)} as a JSON object with the keys name, type and description.", answer


def write_object(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Write a JSON object with given keys and values."""
    keys = rng.sample(PLAIN_WORDS, rng.randint(2, 6))
    values: list[Any] = [rng.choice((rng.randint(0, 999), rng.choice(PLAIN_WORDS), rng.random() < 0.5)) for _ in keys]
    wanted = ", ".join(f"{key} = {json.dumps(value)}" for key, value in zip(keys, values, strict=True))
    return f"Write a JSON object with: {wanted}.", json.dumps(dict(zip(keys, values, strict=True)))


def write_nested(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Write a JSON object of two lists, either of which may be empty."""
    left, right = rng.sample(PLAIN_WORDS, rng.randint(0, 4)), rng.sample(PLAIN_WORDS, rng.randint(0, 4))
    shown = [", ".join(words) or "empty" for words in (left, right)]
    question = f"Write JSON with the list first ({shown[0]}) and the list second ({shown[1]})."
    return question, json.dumps({"first": left, "second": right})


def copy_words(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Copy words or column names exactly."""
    names = [column["column"] for column in schema["columns"]]
    words = rng.sample(names, min(len(names), rng.randint(3, 8)))
    return f"Copy this line exactly:\n{' | '.join(words)}", " | ".join(words)


def sort_words(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Sort words, or reverse their order."""
    words = rng.sample(PLAIN_WORDS, rng.randint(3, 8))
    if rng.random() < 0.5:
        return f"Sort these words alphabetically: {', '.join(words)}", ", ".join(sorted(words))
    return f"Reverse the order of these words: {', '.join(words)}", ", ".join(reversed(words))


def pick_word(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Name the first, last or n-th word, or count the words."""
    words = rng.sample(PLAIN_WORDS, rng.randint(3, 8))
    at = rng.randrange(len(words))
    asked, answer = rng.choice(
        (
            (f"What is word number {at + 1}", words[at]),
            ("What is the last word", words[-1]),
            ("How many words are there", str(len(words))),
        )
    )
    return f"{asked} in: {' '.join(words)}?", answer


def join_words(schema: dict[str, Any], rng: random.Random) -> Turn:
    """Write words in upper case, or with another separator."""
    words = rng.sample(PLAIN_WORDS, rng.randint(2, 5))
    if rng.random() < 0.5:
        return f"Write in capital letters: {' '.join(words)}", " ".join(words).upper()
    return f"Join with hyphens: {' '.join(words)}", "-".join(words)


Maker = Callable[[dict[str, Any], random.Random], Turn]

QUESTIONS: tuple[Maker, ...] = (
    ask_meaning,
    ask_meaning,
    ask_meaning,
    ask_type,
    ask_columns,
    ask_columns_of_type,
    ask_by_description,
    ask_json_description,
)

EXERCISES: tuple[Maker, ...] = (write_object, write_nested, copy_words, sort_words, pick_word, join_words)


def main() -> None:
    """Write the JSON lines and print their number and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--schemas", type=Path, required=True, help="schemas.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    arguments = parser.parse_args()
    lines = []
    for schema in read_schemas(arguments.schemas):
        for turns in documents(schema):
            messages = [
                {"role": role, "content": text}
                for question, answer in turns
                for role, text in (("user", question), ("assistant", answer))
            ]
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    # Neighbouring lines are about one table, which would make batches of correlated text.
    random.Random("instruction").shuffle(lines)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} documents, {arguments.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
