"""Rule generation: from a schema, some of its columns and a pattern to a data-quality or security rule, as JSON.

9,165 examples, 15 for each of 611 schemas, over nine patterns, as in the Granite study (methods.md, section 1.3).
Every field of the answer is a function of the input, so it can be learnt:

- the subject is the first shown column that the pattern applies to;
- the rule type says which of the pattern's two or three word lists the subject matched;
- the severity is that of the rule type, one step up when a shown column is sensitive (secret, personal or financial).

Primary metric: `severity`, which needs the subject, the rule type and every column.
`all_fields` is met by any complete object, and so is no measure of learning.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

from ssmtune.tasks._answers import first_object, is_same
from ssmtune.tasks._catalogue import LICENCE, Schema, draw, num_examples, schemas_at
from ssmtune.tasks._rule_patterns import PATTERNS, Pattern, RuleKind, is_sensitive, raised
from ssmtune.tasks.base import STOPS, Example, Kind

INSTRUCTION = "Write a monitoring rule of the given pattern type for this schema. Answer in JSON."

RULES_PER_SCHEMA = 15

FIELDS = ("rule_type", "severity", "description", "where_clause", "metadata_ids")

MAX_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Rules:
    """The task; see the module. `label` is whether `rule_type` is right."""

    name: str = "rules"
    version: int = 1
    kind: Kind = "tables"
    primary: str = "severity"
    metrics: tuple[str, ...] = ("json_valid", "all_fields", "severity", "label")
    chance: float | None = None
    stops: tuple[str, ...] = STOPS
    max_new_tokens: int = 256
    full_size: int = 611 * RULES_PER_SCHEMA
    licence: str = LICENCE

    def generate(self, size: float, seed: int) -> list[Example]:
        """Return `round(size * full_size)` examples; a schema gets only patterns that one of its columns fits."""
        return draw(f"{self.name}:{self.version}:{seed}", planned(size), _make, instruction=INSTRUCTION)

    def score(self, completion: str, example: Example) -> dict[str, float]:
        """Return whether the answer is JSON, has the five fields, and names the right severity and rule type."""
        answer = first_object(completion)
        if answer is None:
            return dict.fromkeys(self.metrics, 0.0)
        expected = json.loads(example.output)
        return {
            "json_valid": 1.0,
            "all_fields": float(all(field in answer for field in FIELDS)),
            "severity": float(is_same(answer.get("severity"), expected["severity"])),
            "label": float(is_same(answer.get("rule_type"), expected["rule_type"])),
        }


TASK = Rules()


def planned(size: float) -> list[tuple[Schema, str]]:
    """Return (schema, pattern) of every example at `size`, 15 a schema at size 1, rare patterns first."""
    schemas = schemas_at(size)
    total = num_examples(TASK.full_size, size)
    fitting = {
        schema.label: [name for name, pattern in PATTERNS.items() if _subjects(schema, pattern)] for schema in schemas
    }
    used: Counter[str] = Counter()
    own: dict[str, Counter[str]] = {schema.label: Counter() for schema in schemas}
    result = []
    for i in range(total):
        schema = schemas[i % len(schemas)]
        counts = own[schema.label]
        # Evenly within a schema, and among equals the pattern that is rarest so far over all schemas.
        pattern = min(fitting[schema.label], key=lambda name: (counts[name], used[name], name))
        counts[pattern] += 1
        used[pattern] += 1
        result.append((schema, pattern))
    return result


def _subjects(schema: Schema, pattern: Pattern) -> list[str]:
    return [column.name for column in schema.columns if pattern.kind_of(column.name) is not None]


def _make(schema: Schema, variation: str, rng: random.Random) -> tuple[str, str]:
    pattern = PATTERNS[variation]
    names = [column.name for column in schema.columns]
    needed = rng.choice(_subjects(schema, pattern))
    num = rng.randint(5, min(MAX_SHOWN, len(names)))
    shown = [needed, *rng.sample([name for name in names if name != needed], num - 1)]
    rng.shuffle(shown)
    source = json.dumps({"schema_label": schema.label, "columns": shown, "pattern_type": variation})
    return source, json.dumps(rule(schema.label, shown, pattern))


def rule(label: str, shown: list[str], pattern: Pattern) -> dict[str, object]:
    """Return the rule that `pattern` makes of the columns shown: the answer, a function of the question alone."""
    subject, kind = first_match(shown, pattern)
    severity = raised(kind.severity) if any(is_sensitive(name) for name in shown) else kind.severity
    return {
        "rule_type": kind.rule_type,
        "severity": severity,
        "description": kind.description.format(column=subject.replace("_", " "), table=label.replace("_", " ")),
        "where_clause": kind.where.format(column=subject),
        "metadata_ids": [f"{label}.{subject}"],
    }


def first_match(shown: list[str], pattern: Pattern) -> tuple[str, RuleKind]:
    """Return the first column that `pattern` applies to, and the kind of rule it makes of it."""
    for name in shown:
        kind = pattern.kind_of(name)
        if kind is not None:
            return name, kind
    raise AssertionError(f"no column of {shown} fits the pattern")
