"""Reading a JSON object out of what a model wrote."""

from __future__ import annotations

import json
from typing import Any

from ssmtune.tasks.base import stop_text


def first_object(completion: str) -> dict[str, Any] | None:
    """Return the JSON object that starts at the first `{` of the answer, or None when none is complete there.

    Only text before the first stop string counts; text after the object's end is ignored.
    A later object is never tried: an answer that corrects itself was wrong.
    """
    text = stop_text(completion)
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        # ValueError covers bad syntax and numbers of too many digits; RecursionError thousands of open brackets.
        return None
    return value if isinstance(value, dict) else None


def is_same(found: Any, expected: str) -> bool:
    """Return whether a field holds the expected word, whatever its case; False for any other type than a string."""
    return isinstance(found, str) and found.strip().lower() == expected.lower()
