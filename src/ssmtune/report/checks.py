"""What was verified, what failed, and how exported files answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ssmtune.report import text
from ssmtune.report.arms import Collection, origin
from ssmtune.report.sections import Section
from ssmtune.report.sources import Record, Source
from ssmtune.report.tables import Cell, Column, Look, Table

OK, FAILED = Cell("ok", "ok", look="passed"), Cell("failed", "failed", look="failed")


def verify(collection: Collection) -> Section:
    """Per arm and task how many runs were verified, and per arm each check with what it measured, failed ones first."""
    status = _statuses(collection)
    rows = _checks(collection)
    columns = (
        Column("result"),
        Column("arm"),
        Column("check"),
        Column("runs passed", num=True, parts=("", "of")),
        Column("measured", num=True, parts=("least", "largest")),
        Column("limit", num=True),
        Column("where", wrap=True),
    )
    tables = [Table("checks", "Every check of every arm", columns, rows)] if rows else []
    if status:
        headings = (
            Column("arm"),
            Column("task"),
            Column("runs", num=True),
            Column("verify"),
            Column("which", wrap=True),
        )
        tables.insert(0, Table("verified", "Runs and whether they were verified", headings, status))
    return Section(
        "verify",
        "Verify",
        tables=tables,
        how="Each check measures one property of the adapted model and compares it with its limit; a run with a failed "
        "check is provisional and enters no table of results. Not verified means that nobody asked, not that it passed.",
        empty="No run among these records was verified.",
    )


def _reports(collection: Collection) -> list[tuple[Source, Record | None]]:
    """Each training run with its verify report: in its own record, or in a record of its own; then the rest of those."""
    alone = [s for s in collection.of("verify") if s.record.get("checks")]
    by_run = {s.record.get("run_id") or s.record["config"].get("run"): s for s in alone}
    found: list[tuple[Source, Record | None]] = []
    for source in collection.of("train"):
        kept = by_run.pop(source.record.get("run_id"), None)
        found.append((source, source.record.get("verify") or (kept.record if kept is not None else None)))
    return found + [(source, source.record) for source in by_run.values()]


def _statuses(collection: Collection) -> list[list[Cell]]:
    groups: dict[tuple[str, str, str], list[tuple[Source, Record | None]]] = {}
    for source, report in _reports(collection):
        groups.setdefault((source.model, source.arm, source.task), []).append((source, report))
    rows = []
    order = list(collection.arms)
    for (model, name, task), runs in sorted(
        groups.items(), key=lambda g: order.index(g[0][1]) if g[0][1] in order else -1
    ):
        failed = [source for source, report in runs if report is not None and not report["ok"]]
        num_unseen = sum(report is None for _, report in runs)
        num_passed = len(runs) - len(failed) - num_unseen
        counts = ((num_passed, "passed"), (len(failed), "failed"), (num_unseen, "not verified"))
        look: Look = "failed" if failed else ("quiet" if num_unseen else "passed")
        rows.append(
            [
                collection.key(name),
                Cell(f"{model}: {task}" if model else task),
                Cell(str(len(runs)), len(runs), href=origin([source for source, _ in runs])),
                Cell(", ".join(f"{num} {word}" for num, word in counts if num), look=look),
                Cell(", ".join(f"seed {source.seed}" for source in failed)),
            ]
        )
    reusing = [s for s in collection.of("evaluate") if s.config.get("reuse")]
    for (model, name, task), source in {(s.model, s.arm, s.trained_on): s for s in reusing}.items():
        note = Cell(f"evaluates the runs of {source.config['reuse']}", href=f"#{source.group}", look="soft")
        rows.append([collection.key(name), Cell(f"{model}: {task}" if model else task), Cell("0", 0), note, Cell("")])
    return rows


def _checks(collection: Collection) -> list[list[Cell]]:
    found: dict[tuple[str, str], list[tuple[Source, Mapping[str, Any]]]] = {}
    for source, report in _reports(collection):
        for check in report["checks"] if report is not None else []:
            found.setdefault((source.arm, check["name"]), []).append((source, check))
    names = list(dict.fromkeys(name for name, _ in found))
    rows = [
        (all(check["ok"] for _, check in results), names.index(name), _check_row(collection, name, check, results))
        for (name, check), results in found.items()
    ]
    return [row for _, _, row in sorted(rows, key=lambda entry: entry[:2])]


def _check_row(
    collection: Collection, arm: str, check: str, results: Sequence[tuple[Source, Mapping[str, Any]]]
) -> list[Cell]:
    failed = [(r, c) for r, c in results if not c["ok"]]
    shown = [c for _, c in failed or results]
    numbers = [float(c["measured"]) for c in shown if isinstance(c["measured"], (int, float))]
    measured = text.number_text(shown[0]["measured"])
    if len(numbers) == len(shown) and min(numbers) < max(numbers):
        measured = f"{text.number_text(min(numbers))} to {text.number_text(max(numbers))}"
    passed = len(results) - len(failed)
    return [
        FAILED if failed else OK,
        collection.key(arm),
        Cell(check, check),
        Cell(f"{passed} of {len(results)}", (passed, len(results)), href=f"#{(failed or results)[0][0].anchor}"),
        Cell(measured, (min(numbers), max(numbers)) if numbers else None),
        Cell(text.number_text(shown[0]["limit"]), shown[0]["limit"]),
        Cell(shown[0]["where"] or ""),
    ]


def failures(collection: Collection) -> Section:
    """Every record that is not done, and every declared cell that was left out or never ran, listed and counted."""
    # A cell that is not done is one failure, whatever records it holds.
    whole = {s.anchor if s.cell is None else str(s.cell.get("digest")): s for s in reversed(collection.sources)}
    rows = [_failure_row(source) for source in reversed(list(whole.values())) if source.status != "done"]
    known = {(row[1].text, row[2].text, row[3].text) for row in rows}
    for study in collection.studies:
        link = f"#{study.anchor}"
        for f in study.record["failures"]:
            where = (f["name"], f["task"], str(f["seed"]))
            if where not in known:
                cells = [Cell(word, word) for word in ("study cell", *where)]
                rows.append([*cells, _status(f["status"]), Cell(str(f["error"] or ""), href=link)])
        for name in study.record["missing"]:
            cells = [Cell("study cell", "study cell"), Cell(name, name), Cell(""), Cell("")]
            rows.append([*cells, Cell("not run", "not run", look="quiet"), Cell("", href=link)])
    counts = Counter(row[4].text for row in rows)
    words = [f"Left out of every table of results: {_counted(counts)}."] if rows else []
    columns = (
        Column("what"),
        Column("name"),
        Column("task"),
        Column("seed", num=True),
        Column("status"),
        Column("why", wrap=True),
    )
    return Section(
        "failures",
        "Failures",
        words=words,
        tables=[Table("failures", "What is not done", columns, rows)] if rows else [],
        how="Failed records enter nothing; provisional ones (a failed check, or code that was being changed) enter no "
        "table of results, but their curves are shown.",
        empty="None: every record is done.",
    )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{num} {status}" for status, num in counts.items())


def _status(status: str) -> Cell:
    return Cell(status, status, look="failed" if status in ("failed", "aborted") else "quiet")


def _failure_row(source: Source) -> list[Cell]:
    record = source.record if source.cell is None else source.cell
    config = record["config"]
    error = record.get("error") or _why(source.record)
    return [
        Cell(record["kind"].replace("_", " "), record["kind"]),
        Cell(str(record.get("name") or config.get("recipe") or config.get("run") or source.file)),
        Cell(source.task if source.cell is None else str(config["task"])),
        Cell(str(config.get("seed", "")), config.get("seed")),
        _status(source.status),
        Cell(str(error), href=f"#{source.anchor}"),
    ]


def _why(record: Record) -> str:
    """The reason that a record implies where it states none."""
    report = record if record["kind"] == "verify" else record.get("verify")
    if report is not None and report.get("checks") and not report["ok"]:
        return f"verify: {', '.join(check['name'] for check in report['checks'] if not check['ok'])} failed"
    if record.get("note"):
        return str(record["note"])
    if record["environment"].get("dirty"):
        return "the code differed from its commit"
    return "see the record"


def exports(collection: Collection) -> Section:
    """One row per GGUF file: how llama.cpp answers from it beside transformers."""
    rows = [
        [
            OK if record["check"]["ok"] else FAILED,
            Cell(", ".join(record["files"]), href=f"#{source.anchor}"),
            Cell(record["check"]["type"]),
            Cell(
                f"{record['check']['same_top']} of {record['check']['prompts']}",
                (record["check"]["same_top"], record["check"]["prompts"]),
            ),
            Cell(record["check"]["detail"]),
        ]
        for source in collection.of("export")
        if "same_top" in ((record := source.record).get("check") or {})
    ]
    columns = (
        Column("result"),
        Column("file"),
        Column("type"),
        Column("prompts with the same first token", num=True, parts=("", "of")),
        Column("log-probabilities", wrap=True),
    )
    return Section(
        "exports",
        "In llama.cpp",
        tables=[Table("exports", "Files answered through llama.cpp", columns, rows)] if rows else [],
        how="The merged model as a GGUF file, answered through llama.cpp, beside the same weights in transformers on "
        "the same tokens.",
    )
