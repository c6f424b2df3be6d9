"""Plausible cell values for a column, from its name and type. Every value is invented."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from ssmtune.tasks._catalogue import Column

FIRST = (
    "Ana",
    "Ben",
    "Chloe",
    "Dev",
    "Elif",
    "Finn",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Maya",
    "Noah",
    "Omar",
    "Priya",
)
LAST = (
    "Abbott",
    "Berg",
    "Costa",
    "Diaz",
    "Evans",
    "Fischer",
    "Gupta",
    "Haas",
    "Ito",
    "Jensen",
    "Khan",
    "Lopez",
    "Moreau",
    "Novak",
)
ADJECTIVES = (
    "amber",
    "blue",
    "calm",
    "daily",
    "east",
    "fast",
    "green",
    "main",
    "north",
    "old",
    "primary",
    "quiet",
    "red",
    "spare",
    "west",
)
NOUNS = (
    "anchor",
    "basin",
    "cedar",
    "delta",
    "ember",
    "forge",
    "garden",
    "harbor",
    "island",
    "jetty",
    "lake",
    "mesa",
    "orchid",
    "pier",
    "summit",
)
PHRASES = (
    "Needs review", "Created by import", "Weekly sync", "Owner left the team", "No action required",
    "Pending approval", "Migrated",
    "Duplicate of earlier entry", "Approved in meeting", "Rolled back", "Waiting for vendor", "Quota exceeded",
    "Timed out", "Test data",
    "Customer request", "Scheduled change", "Invalid input", "Access denied", "Backfill", "First draft",
    "Updated contact", "See ticket",
)  # fmt: skip
DOMAINS = ("acme.com", "example.org", "northwind.io", "contoso.net", "globex.co", "initech.dev")
REGIONS = ("us-east-1", "us-west-2", "eu-west-1", "eu-central-1", "ap-south-1", "europe-west4", "us-central1")
CITIES = ("Berlin", "Lisbon", "Austin", "Osaka", "Nairobi", "Lyon", "Toronto", "Pune", "Oslo", "Lima")
STATES = (
    "ACTIVE",
    "PENDING",
    "FAILED",
    "COMPLETED",
    "DISABLED",
    "CREATING",
    "DELETED",
    "RUNNING",
    "STOPPED",
    "DRAFT",
    "QUEUED",
    "EXPIRED",
)
KINDS = (
    "STANDARD",
    "CUSTOM",
    "INTERNAL",
    "EXTERNAL",
    "MANAGED",
    "DEFAULT",
    "BASIC",
    "PREMIUM",
    "SHARED",
    "PRIVATE",
    "AUTO",
    "MANUAL",
)
CHOICES: dict[str, tuple[str, ...]] = {
    "severity": ("LOW", "MEDIUM", "HIGH", "CRITICAL", "INFO"),
    "currency": ("USD", "EUR", "GBP", "JPY", "INR", "BRL"),
    "country": ("US", "DE", "BR", "IN", "JP", "FR", "KE"),
    "language": ("en-US", "de-DE", "pt-BR", "ja-JP", "fr-FR", "hi-IN"),
    "timezone": ("UTC", "Europe/Berlin", "America/Chicago", "Asia/Tokyo"),
    "color": ("#1f77b4", "#ff7f0e", "red", "#2ca02c", "teal", "#9467bd"),
    "format": ("CSV", "JSON", "PARQUET", "PDF", "XML", "AVRO"),
    "protocol": ("TCP", "UDP", "HTTPS", "TLS", "HTTP2"),
    "engine": ("mysql", "postgres", "aurora", "redis", "oracle"),
    "architecture": ("x86_64", "arm64", "amd64"),
    "platform": ("LINUX", "WINDOWS", "ANDROID", "IOS", "MACOS"),
    "unit": ("kg", "hour", "GB", "each", "km", "ms"),
    "log": ("DEBUG", "INFO", "WARN", "ERROR", "OFF"),
    "gender": ("F", "M", "X", "U"),
}
WORDS: tuple[tuple[str, str], ...] = (
    ("severity", "severity priority risk level"), ("currency", "currency"), ("country", "country"),
    ("language", "language locale lang"),
    ("timezone", "timezone"), ("color", "color colour"), ("format", "format"), ("protocol", "protocol"),
    ("engine", "engine"),
    ("architecture", "architecture arch"), ("platform", "platform os"), ("unit", "unit units measure"),
    ("gender", "gender sex"),
    ("email", "email mail"), ("arn", "arn"), ("url", "url uri link endpoint href website"),
    ("phone", "phone fax telephone mobile"),
    ("ip", "ip ipv4 ipv6 ips"), ("cidr", "cidr subnet block"), ("region", "region regions"), ("zone", "zone"),
    ("city", "city"),
    ("hash", "hash fingerprint signature sha256 checksum digest etag md5 hmac"),
    ("money", "amount price cost fee total subtotal balance tax"),
    ("date", "date created updated modified expires"), ("time", "time timestamp at on utc"),
    ("id", "id ids identifier uid uuid guid key sid"),
    ("number", "number num no reference ref"), ("path", "path file filename folder prefix directory location"),
    ("bucket", "bucket repository repo namespace dataset database cluster host hostname domain project"),
    ("version", "version revision"),
    ("person", "owner by user username creator author assignee contact principal recipient sender"),
    ("first", "first given"), ("last", "last surname family"), ("state", "status state stage phase result outcome"),
    ("kind", "type category mode class kind scope tier method strategy option action operation"),
    ("kind", "role provider source visibility"),
    ("duration", "duration timeout ttl period interval frequency"), ("code", "code sku postcode zip"),
    ("percent", "percent percentage rate ratio"),
    ("text", "description message reason comment notes note text content summary body detail details"),
    ("text", "error exception title subject"),
)  # fmt: skip
KIND_OF = {word: kind for kind, words in WORDS for word in words.split()}


def value(column: Column, prefix: str, rng: random.Random) -> str:
    """Return one cell of `column`; `prefix` is the table's own mark on its identifiers, such as JIS."""
    if rng.random() < 0.03:
        return ""
    if column.type in BY_TYPE:
        return BY_TYPE[column.type](column.name, prefix, rng)
    return BY_KIND[kind_of(column.name)](column.name, prefix, rng)


def kind_of(name: str) -> str:
    """Return the kind of value that a column of type string holds: its last telling word decides, as in
    `created_by`."""
    if name.endswith("log_level"):
        return "log"
    for word in reversed(name.split("_")):
        if word in KIND_OF:
            return KIND_OF[word]
    return "name"


def _compound(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}" + (f"-{rng.randint(2, 99)}" if rng.random() < 0.4 else "")


def _hex(rng: random.Random, num: int) -> str:
    return f"{rng.getrandbits(4 * num):0{num}x}"


def _date(name: str, prefix: str, rng: random.Random) -> str:
    return f"20{rng.randint(19, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _timestamp(name: str, prefix: str, rng: random.Random) -> str:
    return f"{_date(name, prefix, rng)} {_clock(name, prefix, rng)}"


def _clock(name: str, prefix: str, rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"


def _boolean(name: str, prefix: str, rng: random.Random) -> str:
    return rng.choice(("true", "false"))


def _integer(name: str, prefix: str, rng: random.Random) -> str:
    words = set(name.split("_"))
    if words & {"gb", "mb", "gib", "mib", "days", "hours", "minutes", "seconds", "length", "percentage"}:
        return str(rng.choice((1, 2, 5, 7, 10, 14, 20, 30, 50, 60, 90, 100, 120, 256, 365, 512, 1024)))
    if words & {"bytes", "size", "micros", "millis", "ms"}:
        return str(rng.randint(1, 9999) * 512)
    if words & {"time", "timestamp", "at", "date"}:
        return str(rng.randint(1_550_000_000, 1_790_000_000))
    if words & {"id", "uid", "number", "account"}:
        return str(rng.randint(10_000, 999_999))
    if words & {"version", "revision", "priority", "index", "level", "retry", "order"}:
        return str(rng.randint(1, 20))
    if "port" in words:
        return rng.choice(("22", "80", "443", "5432", "8080", "3306"))
    return str(rng.randint(0, 10 ** rng.randint(1, 4)))


def _decimal(name: str, prefix: str, rng: random.Random) -> str:
    if re.search(r"rate|ratio|percent|score|confidence", name):
        return f"{rng.random():.2f}"
    return f"{rng.randint(1, 9999)}.{rng.randint(0, 99):02d}"


def _email(name: str, prefix: str, rng: random.Random) -> str:
    return f"{rng.choice(FIRST)}.{rng.choice(LAST)}@{rng.choice(DOMAINS)}".lower()


def _person(name: str, prefix: str, rng: random.Random) -> str:
    return rng.choice((f"{rng.choice(FIRST)} {rng.choice(LAST)}", f"{rng.choice(FIRST)[0]}{rng.choice(LAST)}".lower()))


def _identifier(name: str, prefix: str, rng: random.Random) -> str:
    # Another table's identifier carries that table's mark: order_id in a payment starts with ORD.
    stem = name.rpartition("_")[0].replace("_", "")
    mark = stem[:3].upper() or prefix
    return (
        f"{mark}-{rng.randint(100, 99_999)}"
        if "uu" not in name and "gu" not in name
        else f"{_hex(rng, 8)}-{_hex(rng, 4)}"
    )


def _name(name: str, prefix: str, rng: random.Random) -> str:
    return _compound(rng)


def _from(*values: str) -> Callable[[str, str, random.Random], str]:
    return lambda name, prefix, rng: rng.choice(values)


BY_TYPE: dict[str, Callable[[str, str, random.Random], str]] = {
    "timestamp": _timestamp,
    "date": _date,
    "time": _clock,
    "boolean": _boolean,
    "integer": _integer,
    "number": _decimal,
}

BY_KIND: dict[str, Callable[[str, str, random.Random], str]] = {
    **{kind: _from(*values) for kind, values in CHOICES.items()},
    "email": _email,
    "arn": lambda name, prefix, rng: f"arn:aws:{prefix.lower()}:{rng.randint(1000, 9999)}:{rng.choice(NOUNS)}",
    "url": lambda name, prefix, rng: f"https://{rng.choice(DOMAINS)}/{rng.choice(NOUNS)}",
    "phone": lambda name, prefix, rng: f"+{rng.randint(1, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}",
    "ip": lambda name, prefix, rng: f"10.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
    "cidr": lambda name, prefix, rng: f"10.{rng.randint(0, 255)}.0.0/{rng.choice((16, 20, 24))}",
    "region": _from(*REGIONS),
    "zone": lambda name, prefix, rng: rng.choice(REGIONS[:5]) + rng.choice("abc"),
    "city": _from(*CITIES),
    "hash": lambda name, prefix, rng: _hex(rng, 10),
    "money": lambda name, prefix, rng: f"{rng.randint(1, 4999)}.{rng.randint(0, 99):02d}",
    "date": _date,
    "time": _timestamp,
    "id": _identifier,
    "number": lambda name, prefix, rng: str(rng.randint(1000, 99_999)),
    "path": lambda name, prefix, rng: f"/{rng.choice(NOUNS)}/{rng.choice(ADJECTIVES)}",
    "bucket": _name,
    "version": lambda name, prefix, rng: f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}",
    "person": _person,
    "first": _from(*FIRST),
    "last": _from(*LAST),
    "state": _from(*STATES),
    "kind": _from(*KINDS),
    "duration": lambda name, prefix, rng: f"{rng.choice((5, 10, 30, 60, 90, 300, 3600))}s",
    "code": lambda name, prefix, rng: f"{rng.choice('ABCDEFG')}{rng.randint(10, 999)}",
    "percent": lambda name, prefix, rng: f"{rng.randint(0, 100)}%",
    "text": _from(*PHRASES),
    "name": _name,
}
