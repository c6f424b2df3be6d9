"""Pick the 611 schemas that the tasks are generated from and write them as a package asset.

Usage: python recipes/build_catalogue.py --schemas SCHEMAS.jsonl.gz --assets src/ssmtune/assets

The choice is a pure function of the input file: candidates are 8 to 12 columns wide (so that a prompt shows all of
them),
are business or record-like, have a short label, and share at most 60 % of their columns with any schema already chosen.
They are taken one domain after the other, so the first ones, which a small task size uses, are a spread of domains.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

NUM_SCHEMAS = 611
MIN_COLUMNS, MAX_COLUMNS = 8, 12
MAX_BOOLEANS = 4
"""Rows of true and false only cannot be told apart, so examples of such a table would repeat."""
MAX_LABEL_CHARS = 30
MAX_COLUMN_CHARS = 26
MAX_SHARED = 0.6
"""Bound on the Jaccard overlap of two column sets: above it a few dropped columns would make two labels look alike."""
MIN_OWN = 3
"""Columns that at most three candidates have: without them a header row says little about its schema."""

LICENCE_NOTES = {
    "botocore": ("Amazon Web Services service descriptions", "https://github.com/boto/botocore"),
    "google-api-python-client": (
        "Google API discovery documents",
        "https://github.com/googleapis/google-api-python-client",
    ),
    "hl7apy": ("HL7 v2 segment tables", "https://github.com/crs4/hl7apy"),
    "xero-python": ("Xero API models", "https://github.com/XeroAPI/xero-python"),
    "airbyte-source-jira": ("Jira stream schemas", "https://github.com/airbytehq/airbyte"),
    "airbyte-source-chargebee": ("Chargebee stream schemas", "https://github.com/airbytehq/airbyte"),
}


def read_schemas(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the gzipped JSON-lines file `path`, sorted by id so that file order does not matter."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return sorted((json.loads(line) for line in stream), key=lambda row: str(row["id"]))


def label_of(schema: dict[str, Any]) -> str:
    """Return `domain_name` in snake case, without the version digits and repeated words that make labels long."""
    # hl7_v2_8_2 and xero_accounting keep their product word; the version says nothing about the columns.
    domain = re.sub(r"_v\d.*$", "", schema["domain"].replace("-", "_").replace(".", "_").lower())
    name = re.sub(r"_v\d+(_\d+)*$", "", schema["name"])
    words = domain.split("_")
    for word in name.split("_"):
        if word not in words:
            words.append(word)
    return "_".join(words)


def is_candidate(schema: dict[str, Any]) -> bool:
    """Return whether a schema can be shown whole in a short prompt and named by a short label."""
    columns = [c["column"] for c in schema["columns"]]
    return (
        (schema["business"] or schema["record_like"])
        and MIN_COLUMNS <= len(columns) <= MAX_COLUMNS
        and len(set(columns)) == len(columns)
        and sum(c["type"] == "boolean" for c in schema["columns"]) <= MAX_BOOLEANS
        and all(re.fullmatch(r"[a-z][a-z0-9_]*", c) and len(c) <= MAX_COLUMN_CHARS for c in columns)
        and len(label_of(schema)) <= MAX_LABEL_CHARS
        and re.fullmatch(r"[a-z][a-z0-9_]*", label_of(schema)) is not None
    )


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return exactly `NUM_SCHEMAS` rows with distinct labels and well separated column sets, domains interleaved."""
    candidates = [row for row in rows if is_candidate(row)]
    frequency = Counter(c["column"] for row in candidates for c in row["columns"])
    queues: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(candidates, key=lambda row: (-_quality(row), _stable(str(row["id"])))):
        queues[str(row["domain"])].append(row)
    chosen: list[dict[str, Any]] = []
    columns_taken: list[set[str]] = []
    labels: set[str] = set()
    domains = sorted(queues, key=_stable)
    while len(chosen) < NUM_SCHEMAS and any(queues.values()):
        for domain in domains:
            while queues[domain] and len(chosen) < NUM_SCHEMAS:
                row = queues[domain].pop(0)
                columns = {c["column"] for c in row["columns"]}
                own = sum(frequency[c] <= 3 for c in columns)
                if (
                    own < MIN_OWN
                    or label_of(row) in labels
                    or any(_overlap(columns, t) > MAX_SHARED for t in columns_taken)
                ):
                    continue
                chosen.append(row)
                columns_taken.append(columns)
                labels.add(label_of(row))
                break
    if len(chosen) != NUM_SCHEMAS:
        raise SystemExit(
            f"only {len(chosen)} schemas pass the filters; expected {NUM_SCHEMAS}. "
            "Loosen a bound at the top of this file."
        )
    return chosen


def _quality(schema: dict[str, Any]) -> int:
    kinds = {c["type"] for c in schema["columns"]}
    return 2 * bool(schema["business"]) + 2 * bool(schema["record_like"]) + len(kinds - {"string"})


def _stable(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def entry(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the compact catalogue entry of a row: no descriptions."""
    columns = [{"column": c["column"], "original": c["original"], "type": c["type"]} for c in schema["columns"]]
    facts = {key: schema[key] for key in ("name", "domain", "licence", "source")}
    return {"label": label_of(schema), **facts, "columns": columns}


def licences(entries: list[dict[str, Any]]) -> str:
    """Return the attribution page in Markdown."""
    groups = Counter((e["source"], e["licence"]) for e in entries)
    lines = [
        "# Licences of the schema catalogue",
        "",
        f"`catalogue.json.gz` holds the names and types of the columns of {len(entries)} schemas taken from the "
        "packages below.",
        "Only identifiers and types were copied; sample values are generated and are not part of any source.",
        "",
        "| package | what | schemas | licence | project |",
        "|---|---|---|---|---|",
    ]
    for (source, licence), num in sorted(groups.items()):
        what, url = LICENCE_NOTES[source.split("==")[0]]
        lines.append(f"| {source} | {what} | {num} | {licence} | {url} |")
    lines += [
        "",
        "Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0",
        "MIT: https://opensource.org/license/mit",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write `catalogue.json.gz` and `CATALOGUE_LICENCES.md` into the asset directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--schemas", type=Path, required=True, help="schemas.jsonl.gz")
    parser.add_argument("--assets", type=Path, required=True, help="directory to write into")
    arguments = parser.parse_args()
    entries = [entry(row) for row in choose(read_schemas(arguments.schemas))]
    payload = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    arguments.assets.mkdir(parents=True, exist_ok=True)
    # A fixed time stamp keeps the file byte-identical between runs.
    (arguments.assets / "catalogue.json.gz").write_bytes(gzip.compress(payload, 9, mtime=0))
    (arguments.assets / "CATALOGUE_LICENCES.md").write_text(licences(entries), encoding="utf-8")
    print(f"{len(entries)} schemas of {len({e['domain'] for e in entries})} domains")


if __name__ == "__main__":
    main()
