"""Fill the generated parts of README and docs from records and from the code itself.

Run from the repository root: python recipes/render_docs.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssmtune.families.base import family_names, get_family
from ssmtune.methods.base import get_method, method_names
from ssmtune.records import read_record
from ssmtune.report.markdown import study_markdown, update_generated
from ssmtune.tasks.base import get_task, task_names
from ssmtune.verify.base import check_names, get_check

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "records/pretrain/tiny-granite-h.json"
STUDY = ROOT / "records/studies/granite/study.json.gz"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def families() -> str:
    """Which family can take which method: a method is usable where one of its roles exists."""
    methods = list(method_names())
    rows = []
    for name in family_names():
        family = get_family(name)
        roles = {claim.role for claim in family.claims}
        usable = ["yes" if get_method(m).allowed_roles & roles else "-" for m in methods]
        rows.append([name, ", ".join(f"`{t}`" for t in family.model_types), family.topology, *usable])
    return table(["family", "model types", "topology", *methods], rows)


def roles() -> str:
    """Every role of every family with its group and how the model uses it."""
    rows = []
    for name in family_names():
        for claim in get_family(name).claims:
            parts = "" if claim.rows is None else "split into named row ranges"
            rows.append([name, f"`{claim.role}`", claim.group, f"`{claim.path}`", parts])
    return table(["family", "role", "group", "tensor", "rows"], rows)


def methods() -> str:
    """What each method trains and costs."""
    rows = []
    for name in method_names():
        method = get_method(name)
        mergeable = "yes" if method.mergeable else "no"
        rows.append([f"`{name}`", method.summary, method.formula, mergeable, method.overhead, method.source])
    return table(["method", "trains", "parameters per site", "mergeable", "overhead", "source"], rows)


def checks() -> str:
    """What each check of `verify` proves."""
    return table(["check", "proves"], [[f"`{name}`", get_check(name).proves] for name in check_names()])


def tasks() -> str:
    """The tasks with their size and metrics."""
    rows = []
    for name in task_names():
        task = get_task(name)
        metrics = ", ".join(f"**{m}**" if m == task.primary else m for m in task.metrics)
        rows.append([f"`{name}`", str(task.version), f"{task.full_size:,}", metrics, str(task.max_new_tokens)])
    return table(["task", "version", "examples", "metrics (primary in bold)", "longest answer, tokens"], rows)


def pretrain_facts() -> str:
    """The bundled model's figures from its pretraining record."""
    record = read_record(PRETRAIN, kind="pretrain")
    held_out = record["held_out"]
    rows = [
        ["parameters", f"{record['num_params']:,}"],
        ["tokens seen", f"{record['num_tokens']:,}"],
        ["epochs over the corpus", f"{record['epochs']['corpus']:.1f}"],
        ["training time", f"{record['seconds']:.0f} s on one {record['environment']['device']}"],
        ["tokens per second", f"{record['tokens_per_second']:,.0f}"],
        ["held-out bits per byte", f"{held_out['bits_per_byte']:.3f}"],
        ["xz -9e on the same text, bits per byte", f"{held_out['xz_bits_per_byte']:.3f}"],
        ["held-out text", f"{held_out['num_bytes']:,} bytes, {held_out['num_tokens']:,} tokens; {held_out['windows']}"],
    ]
    return table(["", ""], rows)


def pretrain_samples() -> str:
    """Continuations as they were recorded."""
    parts = []
    for sample in read_record(PRETRAIN, kind="pretrain")["samples"]:
        parts.append(
            f"Temperature {sample['temperature']}\n\n```text\n{sample['prompt']}[...]{sample['continuation']}\n```"
        )
    return "\n\n".join(parts)


def study_tables() -> str:
    """All tables of the Granite study."""
    return study_markdown(read_record(STUDY, kind="study"))


def study_headline() -> str:
    """The primary outcome of each arm and task."""
    study = read_record(STUDY, kind="study")
    arms = study["arms"]
    rows = []
    for name in arms:
        row = [name]
        for task in study["tasks"]:
            found = [arm["metrics"][task["primary"]] for arm in task["arms"] if arm["name"] == name]
            row.append(f"{found[0]['mean']:.1%} [{found[0]['low']:.1%}, {found[0]['high']:.1%}]" if found else "-")
        rows.append(row)
    return table(["arm", *(f"{t['task']} ({t['primary']})" for t in study["tasks"])], rows)


def core_movement() -> str:
    """Share of core elements that moved, by arm and tensor, over all tasks and seeds of the study."""
    shares: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((STUDY.parent / "cells").glob("*.json.gz")):
        record = read_record(path, kind="study_cell")
        for entry in (record.get("train") or {}).get("core") or []:
            shares.setdefault((record["name"], entry["tensor"]), []).append(entry)
    rows = []
    for (arm, tensor), entries in sorted(shares.items()):
        num = sum(e["num"] for e in entries)
        moved = sum(e["moved"] * e["num"] for e in entries) / num
        kept = sum(e["survives_bf16"] * e["moved"] * e["num"] for e in entries) / num
        size = sum(e["mean_abs_delta"] * e["num"] for e in entries) / num
        rows.append([arm, f"`{tensor}`", f"{moved:.1%}", f"{size:.2e}", f"{kept:.1%}"])
    return table(
        ["arm", "tensor", "elements that moved", "mean move", "elements that differ after rounding to bf16"], rows
    )


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": study_headline, "families": families},
    "docs/families.md": {"families": families, "roles": roles},
    "docs/methods/README.md": {"methods": methods},
    "docs/verify.md": {"checks": checks},
    "docs/tasks.md": {"tasks": tasks},
    "docs/tiny-granite-h.md": {"facts": pretrain_facts, "samples": pretrain_samples},
    "docs/studies/granite.md": {"study": study_tables, "core": core_movement},
}


def main() -> int:
    """Render every part; with --check, say which pages were out of date and fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a page was out of date")
    arguments = parser.parse_args()
    stale = []
    for page, parts in PARTS.items():
        path = ROOT / page
        before = path.read_bytes()
        for name, render in parts.items():
            update_generated(path, name, render())
        if path.read_bytes() != before:
            stale.append(page)
            if arguments.check:
                path.write_bytes(before)
    print(
        "\n".join(f"{'out of date' if arguments.check else 'updated'}: {page}" for page in stale)
        or "all pages are up to date"
    )
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
