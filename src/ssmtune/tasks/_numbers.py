"""Numbers in what a model wrote, compared by value."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"(?<![\w.])-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?%?")


def to_value(text: str) -> Fraction | None:
    """Return the value of a number as people write it (1,000 or $3.50 or 5/2 or 40%); None for anything else.

    >>> to_value("$1,200.50")
    Fraction(2401, 2)
    """
    bare = re.sub(r"[\s,$%]", "", text).rstrip(".")
    # A number of thousands of digits is none that anybody asked for, and slow to read.
    if len(bare) > 40 or re.fullmatch(r"-?\d+(\.\d+)?(/\d+)?", bare) is None:
        return None
    above, _, below = bare.partition("/")
    return None if below and int(below) == 0 else Fraction(above) / (int(below) if below else 1)


def first_number(text: str) -> Fraction | None:
    """Return the value of the first number in a text."""
    match = NUMBER.search(text)
    return to_value(match.group()) if match else None


def last_number(text: str) -> Fraction | None:
    """Return the value of the last number in a text."""
    found = NUMBER.findall(text)
    return to_value(found[-1]) if found else None
