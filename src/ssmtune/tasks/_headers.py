"""How the same column is written in different files: case styles, synonyms, abbreviations, truncations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

SYNONYMS = {
    "created": "creation", "create": "creation", "creation": "created", "updated": "modified",
    "update": "modification", "modified": "changed",
    "id": "identifier", "identifier": "id", "uid": "unique id", "status": "state", "state": "status",
    "description": "details",
    "name": "title", "title": "name", "type": "kind", "count": "number", "number": "num", "total": "sum",
    "amount": "value", "start": "begin",
    "end": "finish", "owner": "responsible", "user": "account holder", "email": "mail address", "url": "link",
    "uri": "link", "link": "url",
    "message": "text", "reason": "cause", "enabled": "active", "disabled": "inactive", "version": "release",
    "time": "timestamp",
    "timestamp": "time", "last": "latest", "first": "earliest", "size": "volume", "region": "area",
    "location": "place", "code": "short code",
    "customer": "client", "currency": "currency unit", "price": "cost", "cost": "price", "error": "failure",
    "failure": "error",
    "role": "function", "group": "team", "display": "shown", "parent": "superior", "source": "origin",
    "target": "destination",
    "destination": "target", "key": "lookup key", "expiration": "expiry", "expire": "expiry", "resource": "object",
    "job": "task",
    "task": "job", "instance": "node", "policy": "rule set", "project": "workspace", "address": "street address",
    "duration": "length",
    "mode": "method", "category": "class", "comment": "remark", "date": "day", "completed": "finished",
    "completion": "finish",
}  # fmt: skip
ABBREVIATIONS = {
    "created": "crt", "creation": "crt", "create": "crt", "updated": "upd", "update": "upd", "modified": "mod",
    "status": "sts", "state": "stt",
    "description": "dsc", "name": "nm", "type": "typ", "count": "cnt", "number": "nbr", "total": "tot",
    "amount": "amt", "date": "dt", "time": "tm",
    "timestamp": "ts", "identifier": "idn", "address": "adr", "account": "acct", "customer": "cust",
    "message": "msg", "version": "vrs",
    "quantity": "qty", "code": "cd", "user": "usr", "group": "grp", "source": "src", "destination": "dst",
    "target": "tgt", "display": "dsp",
    "enabled": "enb", "reason": "rsn", "resource": "rsc", "instance": "inst", "project": "prj", "region": "rgn",
    "location": "loc", "last": "lst",
}  # fmt: skip
VOWELS = "aeiou"


def words_of(column: str) -> list[str]:
    """Return the words of a snake-case name."""
    return [word for word in column.split("_") if word]


def snake(words: Sequence[str]) -> str:
    """`created_at`."""
    return "_".join(words)


def camel(words: Sequence[str]) -> str:
    """`createdAt`."""
    return words[0] + "".join(word.capitalize() for word in words[1:])


def pascal(words: Sequence[str]) -> str:
    """`CreatedAt`."""
    return "".join(word.capitalize() for word in words)


def title(words: Sequence[str]) -> str:
    """`Created At`."""
    return " ".join(word.upper() if word in ("id", "url", "uri", "ip", "arn") else word.capitalize() for word in words)


def sentence(words: Sequence[str]) -> str:
    """`Created at`."""
    return " ".join(words).capitalize()


def upper(words: Sequence[str]) -> str:
    """`CREATED_AT`."""
    return "_".join(words).upper()


def kebab(words: Sequence[str]) -> str:
    """`created-at`."""
    return "-".join(words)


STYLES: tuple[Callable[[Sequence[str]], str], ...] = (snake, camel, pascal, title, sentence, upper, kebab)


def renamed(column: str, rng: random.Random) -> list[str]:
    """Return the words of `column` with synonyms for known words, else in another order or qualified."""
    words = words_of(column)
    known = [i for i, word in enumerate(words) if word in SYNONYMS]
    if not known:
        return words[::-1] if len(words) == 2 and rng.random() < 0.5 else [*words, rng.choice(("value", "field"))]
    chosen = [i for i in known if rng.random() < 0.7] or [rng.choice(known)]
    return [part for i, word in enumerate(words) for part in (SYNONYMS[word].split() if i in chosen else [word])]


def abbreviated(column: str, limit: int = 12) -> str:
    """Return `column` as an old system writes it: abbreviations, no vowels, upper case, at most `limit` characters."""
    parts = [ABBREVIATIONS.get(word) or _squeezed(word) for word in words_of(column)]
    return "_".join(parts).upper()[:limit].rstrip("_")


def truncated(column: str, rng: random.Random) -> str:
    """Return `column` cut off, the whole name at a width or each word after a few letters."""
    if rng.random() < 0.5:
        return column[: max(4, min(len(column) - 1, rng.randint(7, 11)))].rstrip("_")
    return snake([word[: rng.randint(3, 4)] for word in words_of(column)])


def distinct(headers: Sequence[str], fallback: Sequence[str]) -> list[str]:
    """Return `headers` with each repetition, whatever its case, replaced by its `fallback`, numbered if need be."""
    seen: set[str] = set()
    result = []
    for header, spare in zip(headers, fallback, strict=True):
        options = [header, spare, *(f"{spare}_{i}" for i in range(2, 99))]
        chosen = next(option for option in options if option.lower() not in seen)
        seen.add(chosen.lower())
        result.append(chosen)
    return result


def _squeezed(word: str) -> str:
    kept = word[0] + "".join(letter for letter in word[1:] if letter not in VOWELS)
    return kept[:4]
