"""The report page: one self-contained HTML file, the same bytes for the same records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import plotly.io
import plotly.offline

from ssmtune import records, stats
from ssmtune.report import plots, text
from ssmtune.report.arms import BASE, Arm, Collection, Record, base_comparisons, collect, is_share, task_of
from ssmtune.study import metric_interval

MAX_SAMPLES = 4
"""Examples shown per task: enough to see the style of the answers."""
PLOT_CONFIG = {"displayModeBar": False, "responsive": True, "displaylogo": False}
CORE_TENSORS = ("A_log", "D", "dt_bias")


@dataclass
class _Figures:
    """Turns figures into HTML with ids that count up, so that the page does not change between runs."""

    count: int = 0
    made: list[str] = field(default_factory=list)

    def add(self, figure: Any, title: str) -> dict[str, Any]:
        """Return what the template needs to show `figure` under `title`."""
        self.count += 1
        html = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"plot-{self.count}",
            config=PLOT_CONFIG,
            default_height=f"{figure.layout.height}px",
        )
        return {"title": title, "html": markupsafe.Markup(html)}


def write_report(given: Iterable[Record], out: Path, title: str) -> Path:
    """Write the report of `given` records to `out` and return its path; nothing but the records decides its bytes."""
    collection = collect(given)
    figures = _Figures()
    context = {
        "title": title,
        "arms": list(collection.arms.values()),
        "headline": _headline(collection),
        "studies": [_study(study, figures) for study in collection.studies],
        "losses": _losses(collection, figures),
        "accuracy": _accuracy(collection, figures),
        "coverage": _coverage(collection, figures),
        "core": _core(collection, figures),
        "gates": _gates(collection, figures),
        "checks": _checks(collection),
        "exports": _exports(collection),
        "samples": _samples(collection),
        "provenance": _provenance(collection),
        "method": stats.METHOD,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plotly_js = markupsafe.Markup(plotly.offline.get_plotlyjs())
    page = environment.get_template("template.html.j2").render(context, plotly_js=plotly_js)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    records.write_bytes(out, page.encode())
    return out


def _headline(collection: Collection) -> list[dict[str, Any]]:
    comparisons = base_comparisons(collection)
    tables = []
    for task, metric in collection.tasks.items():
        rows = []
        percent = is_share([e for arm in collection.arms.values() for e in arm.evaluations.get(task, [])], metric)
        for arm in collection.arms.values():
            evaluations = arm.evaluations.get(task)
            if not evaluations:
                continue
            interval, over, values = metric_interval(evaluations, metric)
            compared = comparisons.get((arm.name, task))
            rows.append(
                {
                    "arm": arm,
                    "trainable": _trainable(arm),
                    "value": text.metric_text(interval.mean, percent=percent),
                    "interval": text.interval_text(interval.low, interval.high, percent=percent),
                    "over": f"{len(values)} seeds" if over == "seeds" else f"{interval.num:,} examples",
                    "difference": text.difference_text(compared["difference"], percent=percent) if compared else "",
                    "bounds": text.interval_text(compared["low"], compared["high"], percent=percent, signed=True)
                    if compared
                    else "",
                    "verdict": compared["verdict"] if compared else "",
                    "anchor": _anchor(evaluations[0]),
                }
            )
        tables.append({"task": task, "metric": metric, "rows": rows})
    return tables


def _trainable(arm: Arm) -> str:
    if arm.name == BASE:
        return "0"
    planned = next((r["plan"] for r in arm.train if r.get("plan")), None)
    if planned is None:
        # Of another engine, or of a merged model: there is no training record of that name, and the run is the same.
        planned = next((e["trained"] for found in arm.evaluations.values() for e in found if e.get("trained")), None)
    if planned is None:
        return "not recorded"
    return f"{planned['trainable']:,} ({100 * planned['trainable'] / planned['total']:.2g} %)"


def _study(study: Record, figures: _Figures) -> dict[str, Any]:
    """Forest plots by task and the table of the declared comparisons."""
    shares = {
        table["task"]: all(0 <= v <= 1 for a in table["arms"] for v in a["metrics"][table["primary"]]["values"])
        for table in study["tasks"]
    }
    effects: dict[str, list[plots.Effect]] = {}
    rows = []
    resolvable = {(m["arm"], m["baseline"], m["task"]): m["effect"] for m in study["minimum_detectable_effect"]}
    for c in study["comparisons"]:
        percent, differs = shares[c["task"]], c["verdict"] != "no difference"
        label, words = f"{c['arm']} vs {c['baseline']}", text.difference_text(c["difference"], percent=percent)
        effect = plots.Effect(
            label, c["difference"], c["low"], c["high"], differs, words if differs else f"{words}, no difference"
        )
        effects.setdefault(c["task"], []).append(effect)
        rows.append(
            {
                "task": c["task"],
                "label": label,
                "difference": words,
                "bounds": text.interval_text(c["low"], c["high"], percent=percent, signed=True),
                "p": text.p_text(c["p"]),
                "p_holm": text.p_text(c["p_holm"]),
                "signs": f"{c['seeds_same_sign']} of {c['seeds_compared']}",
                "resolvable": text.difference_text(
                    resolvable[c["arm"], c["baseline"], c["task"]], percent=percent
                ).lstrip("+"),
                "verdict": c["verdict"],
            }
        )
    plotted = [
        figures.add(plots.forest(found, axis=_difference_axis(shares[task]), percent=shares[task]), task)
        for task, found in effects.items()
    ]
    return {"record": study, "anchor": _anchor(study), "plots": plotted, "rows": rows}


def _difference_axis(percent: bool) -> str:
    return "paired difference (percentage points)" if percent else "paired difference"


def _losses(collection: Collection, figures: _Figures) -> list[dict[str, Any]]:
    tasks = sorted({task_of(r) for arm in collection.arms.values() for r in arm.train})
    made = []
    for task in tasks:
        curves = []
        for arm in collection.arms.values():
            runs = [r for r in arm.train if task_of(r) == task]
            train = _mean_curve([[(p["step"], p["loss"]) for p in r.get("history") or []] for r in runs])
            evaluation = _mean_curve([[(p["step"], p["eval_loss"]) for p in r.get("eval_history") or []] for r in runs])
            if train or evaluation:
                curves.append(plots.Curve(arm.style, train, evaluation))
        if curves:
            made.append(figures.add(plots.loss_curves(curves), task))
    return made


def _mean_curve(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean over runs at the steps that every run has."""
    runs = [run for run in runs if run]
    if not runs:
        return []
    tables = [dict(run) for run in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return [(step, float(np.mean([table[step] for table in tables]))) for step in steps]


def _accuracy(collection: Collection, figures: _Figures) -> list[dict[str, Any]]:
    """One figure per task and metric, the primary outcome first."""
    made = []
    for task, primary in collection.tasks.items():
        arms = [arm for arm in collection.arms.values() if task in arm.evaluations]
        names = dict.fromkeys([primary, *(m for arm in arms for m in arm.evaluations[task][0]["metrics"])])
        for metric in names:
            having = [arm for arm in arms if all(metric in e["metrics"] for e in arm.evaluations[task])]
            percent = is_share([e for arm in having for e in arm.evaluations[task]], metric)
            dots = []
            for arm in having:
                interval, _, values = metric_interval(arm.evaluations[task], metric)
                label = text.metric_text(interval.mean, percent=percent)
                dots.append(plots.Dot(arm.style, interval.mean, interval.low, interval.high, values, label))
            if dots:
                note = " (primary outcome)" if metric == primary else ""
                made.append(
                    figures.add(plots.dot_intervals(dots, axis=metric, percent=percent), f"{task}: {metric}{note}")
                )
    return made


def _coverage(collection: Collection, figures: _Figures) -> list[dict[str, Any]]:
    made = []
    for arm in collection.arms.values():
        planned = next((r["plan"] for r in arm.train if r.get("plan") and r["plan"].get("coverage")), None)
        if planned is None:
            continue
        groups = ", ".join(f"{group} {num:,}" for group, num in planned["groups"].items())
        figure = figures.add(plots.coverage_map(planned["coverage"]), arm.name)
        made.append({**figure, "note": f"{planned['trainable']:,} trainable: {groups}"})
    return made


def _core(collection: Collection, figures: _Figures) -> dict[str, Any]:
    """Movement per layer and tensor, averaged over the runs of an arm, and a summary table."""
    moved: dict[str, dict[str, dict[int, list[Mapping[str, Any]]]]] = {}
    for arm in collection.arms.values():
        for row in (row for record in arm.train for row in record.get("core") or []):
            layers = moved.setdefault(row["tensor"], {}).setdefault(arm.name, {})
            layers.setdefault(int(row["layer"]), []).append(row)
    styles = {name: arm.style for name, arm in collection.arms.items()}
    order = [t for t in CORE_TENSORS if t in moved] + sorted(set(moved) - set(CORE_TENSORS))
    shares, deltas, rows = [], [], []
    for tensor in order:
        arms = moved[tensor]
        share = {
            a: [(n, _mean(r, "moved"), _mean(r, "survives_bf16")) for n, r in sorted(arms[a].items())] for a in arms
        }
        delta = {a: [(n, _mean(r, "mean_abs_delta")) for n, r in sorted(arms[a].items())] for a in arms}
        shares.append(figures.add(plots.core_shares(share, styles), f"{tensor}: share of elements"))
        deltas.append(
            figures.add(plots.sizes_by_layer(delta, styles, axis="mean |change|"), f"{tensor}: mean |change|")
        )
        rows += [_core_row(tensor, a, [row for layer in arms[a].values() for row in layer]) for a in arms]
    return {"plots": shares + deltas, "rows": rows}


def _gates(collection: Collection, figures: _Figures) -> list[dict[str, Any]]:
    """How far the gates of branches opened, per block and layer, averaged over the runs of an arm."""
    found: dict[str, dict[str, dict[int, list[Mapping[str, Any]]]]] = {}
    for arm in collection.arms.values():
        for row in (row for record in arm.train for row in record.get("gates") or []):
            found.setdefault(row["block"], {}).setdefault(arm.name, {}).setdefault(int(row["layer"]), []).append(row)
    styles = {name: arm.style for name, arm in collection.arms.items()}
    made = []
    for block, arms in sorted(found.items()):
        sizes = {a: [(n, _mean(rows, "mean_abs")) for n, rows in sorted(arms[a].items())] for a in arms}
        made.append(figures.add(plots.sizes_by_layer(sizes, styles, axis="mean |gate|"), f"{block}: gate"))
    return made


def _core_row(tensor: str, arm: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    known = [(row["horizon_before"], row["horizon_after"]) for row in rows if row["horizon_before"] is not None]
    before, after = np.median(known, axis=0) if known else (None, None)
    return {
        "arm": arm,
        "tensor": tensor,
        "num": f"{rows[0]['num']:,}",
        "moved": text.metric_text(_mean(rows, "moved"), percent=True),
        "survives": text.metric_text(_mean(rows, "survives_bf16"), percent=True),
        "mean": text.number_text(_mean(rows, "mean_abs_delta")),
        "max": text.number_text(max(float(row["max_abs_delta"]) for row in rows)),
        "horizon": f"{text.number_text(before)} to {text.number_text(after)}" if known else "-",
    }


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([float(row[key]) for row in rows]))


def _checks(collection: Collection) -> list[dict[str, Any]]:
    """One row per arm and check over all its runs, failed ones first."""
    made = []
    # A run keeps its report twice: in its own record, which knows the arm's name, and in a record of its own.
    told = {r.get("run_id") for r in collection.sources if r["kind"] == "train" and r.get("verify")}
    verified = [
        r
        for r in collection.sources
        if r["kind"] == "train" or (r["kind"] == "verify" and r["config"].get("run") not in told)
    ]
    for name in dict.fromkeys(_verified_name(r) for r in verified):
        found: dict[str, list[Mapping[str, Any]]] = {}
        for record in verified:
            report = record.get("verify") if record["kind"] == "train" else record
            if _verified_name(record) == name and report:
                for check in report["checks"]:
                    found.setdefault(check["name"], []).append(check)
        made += [_check_row(name, check, results) for check, results in found.items()]
    return sorted(made, key=lambda row: bool(row["ok"]))


def _verified_name(record: Record) -> str:
    return str(record.get("name") or record["config"].get("recipe") or record["config"].get("run") or "run")


def _check_row(arm: str, check: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    failed = [r for r in results if not r["ok"]]
    shown = failed or results
    numbers = [r["measured"] for r in shown if isinstance(r["measured"], (int, float))]
    measured = text.number_text(shown[0]["measured"])
    if len(numbers) == len(shown) and min(numbers) < max(numbers):
        measured = f"{text.number_text(min(numbers))} to {text.number_text(max(numbers))}"
    return {
        "arm": arm,
        "check": check,
        "ok": not failed,
        "runs": f"{len(results) - len(failed)} of {len(results)}",
        "measured": measured,
        "limit": text.number_text(shown[0]["limit"]),
        "where": shown[0]["where"] or "",
    }


def _exports(collection: Collection) -> list[dict[str, Any]]:
    """One row per GGUF file: how llama.cpp answers from it beside transformers."""
    exported = [r for r in collection.sources if r["kind"] == "export" and "same_top" in (r.get("check") or {})]
    return [
        {
            "anchor": _anchor(record),
            "file": ", ".join(record["files"]),
            "ok": record["check"]["ok"],
            "type": record["check"]["type"],
            "same": f"{record['check']['same_top']} of {record['check']['prompts']}",
            "detail": record["check"]["detail"],
        }
        for record in exported
    ]


def _samples(collection: Collection) -> list[dict[str, Any]]:
    """Examples that every arm answered, at each arm's first seed."""
    made = []
    for task, metric in collection.tasks.items():
        answers = {
            arm.name: {s["id"]: s for s in arm.evaluations[task][0].get("samples") or []}
            for arm in collection.arms.values()
            if task in arm.evaluations
        }
        answers = {name: found for name, found in answers.items() if found}
        if not answers:
            continue
        first = next(iter(answers.values()))
        common = [i for i in first if all(i in found for found in answers.values())][:MAX_SAMPLES]
        for number in common:
            columns = [
                {
                    "arm": collection.arms[name],
                    "completion": found[number]["completion"],
                    "score": found[number]["scores"].get(metric),
                }
                for name, found in answers.items()
            ]
            made.append({"task": task, "metric": metric, "sample": first[number], "columns": columns})
    return made


def _provenance(collection: Collection) -> dict[str, Any]:
    environments = [r["environment"] for r in collection.sources if r.get("environment")]
    configs = [r["config"] for r in collection.sources]
    return {
        "versions": _distinct(environments, lambda e: ", ".join(f"{k} {v}" for k, v in e["versions"].items())),
        "python": _distinct(environments, lambda e: f"{e['python']} on {e['platform']}"),
        "devices": _distinct(environments, lambda e: e["device"]),
        "commits": _distinct(
            environments, lambda e: (e["commit"] or "not a checkout") + (" (changed)" if e["dirty"] else "")
        ),
        "models": _distinct(configs, lambda c: c.get("model")),
        "seeds": ", ".join(str(s) for s in sorted({c["seed"] for c in configs if isinstance(c.get("seed"), int)})),
        "left_out": [_source(r) for r in collection.sources if r["status"] != "done"],
        "records": [_source(r) for r in collection.sources],
    }


def _distinct(values: Iterable[Any], of: Callable[[Any], Any]) -> list[str]:
    return list(dict.fromkeys(str(found) for value in values if (found := of(value)) is not None))


def _source(record: Record) -> dict[str, Any]:
    config = record["config"]
    return {
        "anchor": _anchor(record),
        "kind": record["kind"],
        "name": record.get("name") or config.get("recipe") or "",
        "task": task_of(record),
        "seed": config.get("seed", ""),
        "status": record["status"],
        "run_id": record.get("run_id") or "",
        "created": record.get("created", ""),
        "took": text.seconds_text(record.get("seconds")),
        "memory": text.bytes_text(record.get("peak_memory_bytes")),
        "error": record.get("error") or "",
    }


def _anchor(record: Record) -> str:
    return f"record-{records.digest(record)}"
