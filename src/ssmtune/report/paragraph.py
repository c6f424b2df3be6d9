"""The methods paragraph: what was run and how it was judged, in sentences made from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import markupsafe

from ssmtune import stats
from ssmtune.report import text
from ssmtune.report.arms import Collection
from ssmtune.report.comparisons import is_share
from ssmtune.report.sections import Section
from ssmtune.report.sources import Record, Source
from ssmtune.report.tables import Cell, Column, Table

MAX_LISTED = 12
"""Rates and smallest effects that are named one by one; more of them are told by their range."""

EXECUTION = ("output_dir", "workers", "retries")
"""Fields of a study that say how it was run, not what it is."""
SETTINGS = (
    ("rank", ("lora", "rank")),
    ("alpha", ("lora", "alpha")),
    ("dropout", ("lora", "dropout")),
    ("parameter budget", ("budget",)),
    ("epochs", ("num_epochs",)),
    ("steps at most", ("max_steps",)),
    ("rows per step", ("rows_per_step",)),
    ("tokens per row at most", ("data", "max_length")),
    ("base in", ("dtype",)),
    ("learning rate", ("optimizer", "learning_rate")),
    ("learning rate of the core", ("optimizer", "core_learning_rate")),
    ("clipping", ("optimizer", "clip")),
)
"""What the paragraph says of training: words, and where a train record's config holds it."""


def methods(collection: Collection) -> Section:
    """One paragraph per study; without a study, one that says that nothing was declared in advance."""
    words = [_study(collection, study) for study in collection.studies]
    if not words and (collection.of("train") or collection.of("evaluate")):
        words = [_runs(collection)]
    return Section(
        "methods",
        "Methods",
        words=words,
        tables=_tried(collection),
        how="These sentences are made from the records, and change with them.",
        empty="" if words else "No study and no run among these records.",
    )


def _tried(collection: Collection) -> list[Table]:
    """The rates that were tried before a study, with the validation loss of each; training that diverged has none."""
    chosen = {
        (t["name"], t["task"], tuple(sorted(t["rates"].items())))
        for study in collection.studies
        for t in study.record.get("tuned") or []
    }
    rows = []
    for source in collection.of("study_tuning"):
        record = source.record
        rates = record.get("rates") or {}
        key = (record.get("name"), source.task, tuple(sorted(rates.items())))
        words = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in rates.items())
        loss = record.get("validation_loss")
        shown = "diverged" if loss is None and source.status == "done" else text.number_text(loss)
        rows.append(
            [
                Cell(str(record.get("name") or ""), record.get("name")),
                Cell(source.task, source.task),
                Cell(words, words),
                Cell(shown, loss, href=f"#{source.anchor}"),
                Cell("chosen" if key in chosen else "", look="found"),
            ]
        )
    columns = (Column("arm"), Column("task"), Column("rates"), Column("validation loss", num=True), Column("choice"))
    return [Table("tuning", "Rates tried before the study", columns, rows)] if rows else []


def _study(collection: Collection, study: Source) -> markupsafe.Markup:
    record, config = study.record, study.record["config"]
    models = [str(m) for m in (config.get("models") or {}).values()] or [str(config.get("model"))]
    tasks = [f"{t['name']} (outcome {t['primary']}, size {t['size']})" for t in config["tasks"]]
    lines = [
        f"{_listed(models)} {'was' if len(models) == 1 else 'were'} fine-tuned on {_listed(tasks)}",
        f"with the seeds {_listed(config['seeds'])}"
        + (f", each with the data orders {_listed(orders)}" if (orders := config.get("data_orders")) else "")
        + f", in {len(config['cells'])} arms: {'; '.join(_arm(name, cell) for name, cell in config['cells'].items())}",
    ]
    sentences = [", ".join(lines), *_training(collection), _tuning(collection, record), _evaluated(collection, config)]
    sentences += [
        "Differences are paired by seed and example; intervals of 95 % and p by: " + record["method"],
        _adjustment(record),
        *_resolvable(record),
    ]
    made = markupsafe.Markup('<a href="#{}">{}</a>: ').format(study.anchor, record["name"])
    made += ". ".join(s for s in sentences if s) + ". "
    return made + _registration(collection, study)


def _runs(collection: Collection) -> markupsafe.Markup:
    runs, found = collection.of("train"), [s for s in collection.of("evaluate") if s.status == "done"]
    models = dict.fromkeys(str(s.record["config"].get("model")) for s in (*runs, *found))
    sentences = [
        f"{len(runs)} training runs and {len(found)} finished evaluations of {_listed(models)}",
        *_training(collection),
        _evaluated(collection, {}),
        "No study declared a comparison in advance: the differences to the base were chosen by this page, are paired "
        f"by seed and example, and are adjusted among themselves by Holm; intervals and p by: {stats.METHOD}",
    ]
    return markupsafe.Markup("{}.").format(". ".join(s for s in sentences if s))


def _arm(name: str, cell: Mapping[str, Any]) -> str:
    recipe = cell.get("recipe")
    named = recipe["name"] if isinstance(recipe, dict) else recipe
    words = f"recipe {named}" if named else "not trained"
    if cell.get("reuse"):
        words = f"the runs of {cell['reuse']} without their core"
    words += f", {cell['shots']} solved examples before each question" if cell.get("shots") else ""
    words += f", {len(cell['draws'])} placements drawn at random" if cell.get("draws") else ""
    words += f", on {_listed(cell['models'])}" if cell.get("models") else ""
    return f"{name} ({words})"


def _training(collection: Collection) -> list[str]:
    """What all training runs share, and what differs between them."""
    configs = [s.record["config"] for s in collection.of("train")]
    if not configs:
        return []
    shared, different = [], []
    for words, path in SETTINGS:
        values = list(dict.fromkeys(_at(config, path) for config in configs))
        if len(values) > 1:
            different.append(f"{words} {_listed(v for v in values if v is not None)}")
        elif values[0] is not None:
            shared.append(f"{words} {_plain(values[0])}")
    lines = [f"All training runs: {', '.join(shared)}"] if shared else []
    return lines + ([f"Different between runs: {'; '.join(different)}"] if different else [])


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _tuning(collection: Collection, record: Record) -> str:
    config, tuned = record["config"], record.get("tuned") or []
    tune = config.get("tune") or next((c["tune"] for c in config["cells"].values() if c.get("tune")), None)
    if tune is None:
        return "No rate was tuned within the study"
    lists = [f"{n.replace('_', ' ')} {_listed(v)}" for n, v in tune.items() if n.endswith("_rate") and v]
    where = f"on {tune['task']} for all" if tune.get("task") else "for each model, arm and task"
    chosen = dict.fromkeys((t["name"], t["task"], tuple(sorted(t["rates"].items()))) for t in tuned)
    if len(chosen) <= MAX_LISTED:
        words = "; ".join(f"{name} on {task}: {_listed(f'{v:g}' for _, v in rates)}" for name, task, rates in chosen)
    else:
        counts = Counter(", ".join(f"{v:g}" for _, v in rates) for _, _, rates in chosen)
        words = f"{_listed(f'{rates} ({num} times)' for rates, num in sorted(counts.items()))}"
        words += ", as the table below says" if collection.of("study_tuning") else ""
    return (
        f"Rates were chosen by {tune.get('on', 'validation')} loss with the seed {tune['seed']}, which no reported run "
        f"uses, {where}, from {'; '.join(lists)}" + (f"; chosen: {words}" if words else "")
    )


def _evaluated(collection: Collection, config: Mapping[str, Any]) -> str:
    counts = dict.fromkeys(
        (s.task, len(s.record["example_ids"])) for s in collection.of("evaluate") if s.status == "done"
    )
    if not counts:
        return ""
    others = [t["name"] for t in config.get("transfer") or []]
    extra = f"; every trained arm also on {_listed(others)}, whichever of them it was not trained on" if others else ""
    return f"Evaluated on {_listed(f'{num:,} examples of {task}' for task, num in counts)}{extra}"


def _adjustment(record: Record) -> str:
    families = record.get("families") or []
    if len(families) < 2:
        return f"p is adjusted by Holm over all {record['num_comparisons']} declared comparisons"
    sizes = _listed(f"{f['name']} ({f['num_comparisons']})" for f in families)
    return f"p is adjusted by Holm within each of {len(families)} declared families of comparisons: {sizes}"


def _resolvable(record: Record) -> list[str]:
    """The range of effects that a repetition would find, per panel; over all panels of a kind where there are many."""
    sizes: dict[tuple[str, bool], list[float]] = {}
    many = len({m["task"] for m in record["minimum_detectable_effect"]}) > MAX_LISTED
    for found in record["minimum_detectable_effect"]:
        task = found["task"]
        kind = "on other tasks" if " -> " in task else "on the task trained on"
        percent = is_share(record, task)
        sizes.setdefault((f"{kind}, {'shares' if percent else 'scores'}" if many else task, percent), []).append(
            found["effect"]
        )
    lines = []
    for (name, percent), effects in sizes.items():
        low, high = (text.size_text(pick(effects), percent=percent) for pick in (min, max))
        lines.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    if not lines:
        return []
    return [f"The smallest true difference that a repetition would find with a power of 80 %: {'; '.join(lines)}"]


def _registration(collection: Collection, study: Source) -> markupsafe.Markup:
    """Which pre-registration the study has, and whether it is older than the first of its cells."""
    found = [s for s in collection.of("preregistration") if _declares(s.record, study.record)]
    if not found:
        return markupsafe.Markup("No pre-registration of this study is among these records.")
    first = found[0]
    cells = [str(s.cell["created"]) for s in collection.sources if s.cell is not None and s.cell.get("created")]
    when, written = min(cells, default=None), str(first.record.get("created", ""))
    order = ""
    if when is not None:
        order = f", {'before' if written <= when else 'AFTER'} the first cell ended ({when})"
    assumed = first.record.get("minimum_detectable_effect")
    ahead = f"; it stated {text.number_text(assumed)} as the smallest effect resolved" if assumed else ""
    return markupsafe.Markup('Declared in the pre-registration <a href="#{}">{}</a>, written {}{}{}.').format(
        first.anchor, first.record["digest"], written, order, ahead
    )


def _declares(registration: Record, study: Record) -> bool:
    """Whether the study names the registration, or where it names none, declares the same."""
    if study.get("preregistrations"):
        return registration["digest"] in study["preregistrations"]
    plain = [{k: v for k, v in r["config"].items() if k not in EXECUTION} for r in (registration, study)]
    return plain[0] == plain[1]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(values: Iterable[Any]) -> str:
    words = [_plain(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"
