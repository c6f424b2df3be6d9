"""Compact tables of the studies of placement, methods and side effects, from their records; "Not run yet." without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from claims import METHODS, PLACEMENT, SIDE_EFFECTS, label, stored

NOT_RUN_YET = "Not run yet."


def placement_arms() -> str:
    """What each placement reaches on the task it was trained on, by model."""
    return _arms(stored(PLACEMENT))


def placement_transfer() -> str:
    """The transfer matrix: mean primary outcome on every test, by model, arm and task trained on."""
    record = stored(PLACEMENT)
    if record is None:
        return NOT_RUN_YET
    panels = record["tasks"]
    tests = list(dict.fromkeys(panel["evaluated_on"] for panel in panels))
    rows = []
    for model in dict.fromkeys(panel["model"] for panel in panels):
        for trained_on in dict.fromkeys(panel["trained_on"] for panel in panels):
            own = {p["evaluated_on"]: p for p in panels if (p["model"], p["trained_on"]) == (model, trained_on)}
            for arm in dict.fromkeys(arm["name"] for panel in own.values() for arm in panel["arms"]):
                cells = [_mean(own[test], arm) if test in own else "-" for test in tests]
                rows.append([model, short(trained_on), arm, *cells])
    return _table(["model", "trained on", "arm", *map(short, tests)], rows)


def placement_comparisons() -> str:
    """Every declared comparison on the tasks trained on, and how many of each family are resolved."""
    record = stored(PLACEMENT)
    if record is None:
        return NOT_RUN_YET
    own = [c for c in record["comparisons"] if c["trained_on"] == c["evaluated_on"]]
    return _resolved(record["comparisons"]) + "\n\n" + _comparisons(own)


def methods_arms() -> str:
    """What each method reaches, by task."""
    return _arms(stored(METHODS))


def methods_comparisons() -> str:
    """Every declared comparison of methods."""
    record = stored(METHODS)
    return (
        NOT_RUN_YET
        if record is None
        else _resolved(record["comparisons"]) + "\n\n" + _comparisons(record["comparisons"])
    )


def side_effects_means() -> str:
    """Held-out bits per byte and recall after training, by arm and task trained on."""
    record = stored(SIDE_EFFECTS)
    if record is None:
        return NOT_RUN_YET
    rows = [
        [entry["arm"], short(entry["task"]) or "-", interval(entry["bits_per_byte"]), interval(entry["recall"])]
        for entry in record["means"]
    ]
    table = _table(["arm", "trained on", "held-out bits per byte", "recall, right of four"], rows)
    missing = record.get("missing", [])
    if not missing:
        return table
    named = dict.fromkeys(f"{entry['arm']} on {short(entry['task'])}" for entry in missing)
    return f"{table}\n\nNot measured with every seed, and so in no row: {', '.join(named)}."


def side_effects_comparisons() -> str:
    """Every comparison with the base, and of frozen with trained query and key projections."""
    record = stored(SIDE_EFFECTS)
    if record is None:
        return NOT_RUN_YET
    rows = [{**c, "task": f"{c['task']}: {c['metric'].replace('_', ' ')}"} for c in record["comparisons"]]
    return _comparisons(rows)


def short(task: str) -> str:
    """A task's name without the module that holds it."""
    return task.replace("study_tasks:", "")


def interval(found: Mapping[str, Any]) -> str:
    """A mean with its interval; the mean alone where one value has none."""
    if found["low"] is None:
        return f"{found['mean']:.3f}"
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _arms(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return NOT_RUN_YET
    own = [panel for panel in record["tasks"] if panel["trained_on"] == panel["evaluated_on"]]
    arms = list(dict.fromkeys(arm["name"] for panel in own for arm in panel["arms"]))
    if any(panel["model"] for panel in own):
        rows = [[p["model"], short(p["trained_on"]), *(_interval(p, arm) for arm in arms)] for p in own]
        return _table(["model", "trained on", *arms], rows) + "\n\n" + at_the_edge(record)
    heads = [f"{short(panel['trained_on'])} ({panel['primary']})" for panel in own]
    made = _table(["arm", *heads], [[arm, *(_interval(panel, arm) for panel in own)] for arm in arms])
    return made + "\n\n" + at_the_edge(record)


def at_the_edge(record: Mapping[str, Any]) -> str:
    """How often the highest of the rates that were tried was chosen: a still higher one might have been better."""
    choices = {(t["name"], t["task"]): t["rates"] for t in record["tuned"]}
    highest = 0
    for (name, _), rates in choices.items():
        arm = record["config"]["cells"][name.rpartition(": ")[2]]
        tried = arm.get("tune") or record["config"]["tune"]
        highest += all(value == max(tried[rate]) for rate, value in rates.items())
    return f"Of {len(choices)} choices of a rate, {highest} fell on the highest of those tried."


def _found(panel: Mapping[str, Any], arm: str) -> Mapping[str, Any] | None:
    return next((a["metrics"][panel["primary"]] for a in panel["arms"] if a["name"] == arm and a["metrics"]), None)


def _interval(panel: Mapping[str, Any], arm: str) -> str:
    found = _found(panel, arm)
    return "-" if found is None else interval(found)


def _mean(panel: Mapping[str, Any], arm: str) -> str:
    found = _found(panel, arm)
    return "-" if found is None else f"{found['mean']:.3f}"


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            label(row),
            f"{row['arm']} - {row['baseline']}",
            f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            f"{row['p_holm']:.3f}",
            f"{row['seeds_same_sign']} of {row['seeds_compared']}",
            row["verdict"],
        ]
        for row in rows
    ]
    return _table(["on", "comparison", "difference", "p (Holm)", "seeds of that sign", "verdict"], cells)


def _resolved(rows: Sequence[Mapping[str, Any]]) -> str:
    families: dict[str, list[str]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row["verdict"])
    cells = [
        [
            family,
            str(len(found)),
            str(found.count("higher")),
            str(found.count("lower")),
            str(found.count("no difference")),
        ]
        for family, found in families.items()
    ]
    return _table(["family", "comparisons", "higher", "lower", "no difference"], cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
