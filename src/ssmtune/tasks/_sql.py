"""SQL that a model wrote: taken out of its answer, compared as text, and executed against a database in memory."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ssmtune.tasks._sandbox import Outcome, run_queries

MAX_SECONDS = 4.0

DIGITS = 6
"""Significant digits that two numbers of a result must share."""

MAX_ORDERS = 5_000
"""Orders of columns tried before two results count as different."""


def read_sql(text: str) -> str:
    """Return the first statement of an answer, without its semicolon: that of the first fenced block where there is one.

    >>> read_sql("Here: select ';' from t; select 2")
    "select ';' from t"
    """
    fenced = re.search(r"```(?:sqlite|sql)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE)
    body = fenced.group(1) if fenced else text
    start = re.search(r"\b(select|with)\b", body, re.IGNORECASE)
    body = body[start.start() :] if start else body
    quoted = re.match(r"(?:[^;'\"]|'[^']*'|\"[^\"]*\")*", body)
    statement = quoted.group() if quoted else ""
    return re.split(r"\n\s*\n", statement, maxsplit=1)[0].strip()


def tokens(sql: str) -> list[str]:
    """Return the parts of a statement in lower case, quoted text as it is written and without its kind of quote."""
    parts = re.findall(r"'[^']*'|\"[^\"]*\"|[\w.]+|<=|>=|!=|<>|[^\w\s]", sql)
    return [part[1:-1] if part[0] in "'\"" else part.lower() for part in parts]


def run_beside(script: str, query: str, references: Sequence[str]) -> Outcome:
    """Run one query and its references in one process, so that the current date is the same for all."""
    return run_queries(script, [query, *references], max_seconds=MAX_SECONDS)


def is_ordered(sql: str) -> bool:
    """Return whether the order of the rows is asked for: ORDER BY outside every bracket."""
    bare, depth = "", 0
    for char in re.sub(r"'[^']*'|\"[^\"]*\"", "", sql):
        depth += (char == "(") - (char == ")")
        bare += char if depth == 0 else " "
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def same_result(given: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]], *, ordered: bool) -> bool:
    """Return whether two results hold the same rows, as many times each, whatever the order of their columns.

    Numbers are compared to six digits, so 3 equals 3.0; `ordered`: the rows must come in the same order as well.
    """
    left, right = ([[_plain(v) for v in row] for row in rows] for rows in (given, expected))
    if len(left) != len(right):
        return False
    if not left:
        return True
    if len(left[0]) != len(right[0]):
        return False
    # Which columns of the one could be which of the other; most results leave one order.
    signatures = [[Counter(map(repr, column)) for column in zip(*rows, strict=True)] for rows in (left, right)]
    places = [[i for i, own in enumerate(signatures[0]) if own == other] for other in signatures[1]]
    wanted = [tuple(row) for row in right]
    for order in itertools.islice(itertools.product(*places), MAX_ORDERS):
        if len(set(order)) < len(order):
            continue
        found = [tuple(row[i] for i in order) for row in left]
        if found == wanted or (not ordered and Counter(map(repr, found)) == Counter(map(repr, wanted))):
            return True
    return False


def _plain(value: Any) -> Any:
    """A value as it is compared."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, (int, float)) else value
