"""Generated Markdown of a study, and its place in a hand-written page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmtune import records
from ssmtune.errors import ConfigError
from ssmtune.report import text


def study_markdown(study: Mapping[str, Any]) -> str:
    """Return the tables of a study record: outcomes per task, declared comparisons, and what was left out."""
    shares = {table["task"]: _is_share(table, table["primary"]) for table in study["tasks"]}
    parts = [part for table in study["tasks"] for part in (f"### {table['task']}", _outcomes(table))]
    parts += ["### Comparisons declared in advance", _comparisons(study, shares)]
    adjusted = f"Holm's adjustment over all {study['num_comparisons']} declared comparisons."
    if len(families := study.get("families", ())) > 1:
        sizes = ", ".join(f"{family['name']} ({family['num_comparisons']})" for family in families)
        adjusted = f"{study['num_comparisons']} declared comparisons; Holm's adjustment within each family: {sizes}."
    parts.append(f"Intervals of 95 %: {study['method']}.\n{adjusted}")
    parts.append(_counts(study))
    return "\n\n".join(parts) + "\n"


def _is_share(table: Mapping[str, Any], metric: str) -> bool:
    return all(0 <= v <= 1 for arm in table["arms"] for v in arm["metrics"][metric]["values"])


def _outcomes(table: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys([table["primary"], *(m for arm in table["arms"] for m in arm["metrics"])]))
    header = ["arm", "seeds", *(f"**{name}**" if name == table["primary"] else name for name in names)]
    rows = []
    for arm in table["arms"]:
        cells = []
        for name in names:
            m, percent = arm["metrics"][name], _is_share(table, name)
            interval = text.interval_text(m["low"], m["high"], percent=percent)
            cells.append(f"{text.metric_text(m['mean'], percent=percent)} {interval}".strip())
        rows.append([arm["name"], str(arm["num_seeds"]), *cells])
    return _table(header, rows)


def _comparisons(study: Mapping[str, Any], shares: Mapping[str, bool]) -> str:
    header = ["task", "comparison", "difference [95 %]", "p", "p (Holm)", "seeds of that sign", "verdict"]
    rows = []
    for c in study["comparisons"]:
        percent = shares[c["task"]]
        interval = text.interval_text(c["low"], c["high"], percent=percent, signed=True)
        rows.append(
            [
                c["task"],
                f"{c['arm']} vs {c['baseline']}",
                f"{text.difference_text(c['difference'], percent=percent)} {interval}",
                text.p_text(c["p"]),
                text.p_text(c["p_holm"]),
                f"{c['seeds_same_sign']} of {c['seeds_compared']}",
                c["verdict"],
            ]
        )
    return _table(header, rows)


def _counts(study: Mapping[str, Any]) -> str:
    counts = study["num_cells"]
    line = f"{counts.get('done', 0)} of {counts['expected']} cells are done"
    if study.get("mixed_code"):
        line += f" (cells of {', '.join(study['mixed_code'])} ran different code and should be run again)"
    if not study["failures"] and not study["missing"]:
        return line + "; none failed."
    left_out = [
        f"- {f['name']}, {f['task']}, seed {f['seed']}: {f['status']} ({f['error']})" for f in study["failures"]
    ]
    return "\n".join(
        [line + "; left out of every table:", *left_out, *(f"- {name}: not run" for name in study["missing"])]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def update_generated(path: Path | str, name: str, body: str) -> Path:
    """Replace what is between `<!-- generated:begin NAME -->` and `<!-- generated:end NAME -->` in `path` by `body`.

    The rest of the file is left as it is. Raises `ConfigError` unless each marker stands there once, in that order.
    """
    path = Path(path)
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- generated:begin {name} -->", f"<!-- generated:end {name} -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ConfigError(f"{path}: expected '{begin}' once and '{end}' after it. Add them.")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    records.write_bytes(path, f"{before}{begin}\n\n{body.strip()}\n\n{end}{after}".encode())
    return path
