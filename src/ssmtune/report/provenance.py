"""Where the numbers come from: environment, and every record with the file that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ssmtune.report import text
from ssmtune.report.arms import Collection
from ssmtune.report.sources import Source

KINDS = ("study", "preregistration", "train", "evaluate", "verify", "benchmark", "export")


@dataclass(frozen=True)
class Group:
    """The records of one kind, arm and task: what a number over runs links to."""

    anchor: str
    title: str
    sources: Sequence[Source]


def environment(collection: Collection) -> list[tuple[str, str]]:
    """Return what the records say of models, versions, machines and code, as terms and their values."""
    environments = [s.record["environment"] for s in collection.sources if s.record.get("environment")]
    configs = [s.record["config"] for s in collection.sources]
    found = {
        "Models": _distinct(configs, lambda c: c["model"] if isinstance(c.get("model"), str) else None),
        "Versions": _distinct(environments, lambda e: ", ".join(f"{k} {v}" for k, v in e.get("versions", {}).items())),
        "Python": _distinct(environments, lambda e: f"{e.get('python')} on {e.get('platform')}"),
        "Device": _distinct(environments, lambda e: e.get("device")),
        "Commit": _distinct(
            environments, lambda e: (e.get("commit") or "not a checkout") + (" (changed)" if e.get("dirty") else "")
        ),
        "Seeds": _distinct(sorted({s.seed for s in collection.sources if s.seed is not None}), lambda seed: seed),
    }
    return [(term, "; ".join(values) or "not recorded") for term, values in found.items()]


def _distinct(values: Iterable[Any], of: Callable[[Any], Any]) -> list[str]:
    return list(dict.fromkeys(str(found) for value in values if (found := of(value)) is not None))


def groups(collection: Collection) -> list[Group]:
    """Return every record under its kind, arm and task, kinds in the order of `KINDS`."""
    found: dict[str, list[Source]] = {}
    for source in collection.sources:
        found.setdefault(source.group, []).append(source)
    made = [Group(anchor, _title(sources[0]), sources) for anchor, sources in found.items()]
    rank = {kind: i for i, kind in enumerate(KINDS)}
    return sorted(made, key=lambda group: rank.get(group.sources[0].record["kind"], len(rank)))


def _title(source: Source) -> str:
    kind = str(source.record["kind"]).replace("_", " ")
    if source.record["kind"] not in ("train", "evaluate"):
        return kind
    task = source.task if source.trained_on in ("", source.task) else f"{source.trained_on} -> {source.task}"
    return " ".join(part for part in (kind, source.model, source.arm, task) if part)


def facts(source: Source) -> dict[str, str]:
    """Return what the list of records says of one."""
    record = source.record
    return {
        "name": str(record.get("name") or record.get("digest") or record.get("run_id") or ""),
        "seed": " ".join(part for part in (str(source.seed if source.seed is not None else ""), _axes(source)) if part),
        "status": source.status if "status" in record else "",
        "created": str(record.get("created", "")),
        "took": text.seconds_text(record.get("seconds")),
        "memory": text.bytes_text(record.get("peak_memory_bytes")),
    }


def _axes(source: Source) -> str:
    axes = [] if source.cell is None else [(a, source.config.get(a)) for a in ("data_order", "draw")]
    return ", ".join(f"{name.replace('data_', '')} {value}" for name, value in axes if value is not None)
