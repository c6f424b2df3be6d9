"""Fill the generated parts of README and docs from records and from the code itself.

Run from the repository root: python recipes/render_docs.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ssmtune.cli.tasks import task_rows
from ssmtune.export.base import get_target, target_names
from ssmtune.families.base import family_names, get_family
from ssmtune.inventory import take_inventory
from ssmtune.methods.base import get_method, method_names
from ssmtune.models import empty_model, weightless
from ssmtune.quantize import choose, summary
from ssmtune.quantized import QuantizeConfig
from ssmtune.records import read_record
from ssmtune.report.markdown import study_markdown, update_generated
from ssmtune.tasks._sequences import SequenceTask
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import STOPS, GeneratedTask, get_task, messages, sample_examples, task_names
from ssmtune.verify.base import check_names, get_check

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "records/pretrain/tiny-granite-h.json"
GGUF = ROOT / "records/export/gguf.json"
MERGE = ROOT / "records/export/merge-3b.json"
STUDY = ROOT / "records/studies/granite/study.json.gz"
S4_REGRESSION = ROOT / "records/studies/s4-regression.json.gz"
BENCH = ROOT / "records/bench"
CPU = BENCH / "operations-cpu.json"
POSITIONS = {"state.prompt", "state.prefix"}
"""Roles of learned positions, which lie before the whole model and are no part of a recurrence."""
HANKEL_STEP = BENCH / "hankel-step-cpu.json"
STATISTICS = ROOT / "records/studies/statistics.json"
TRACKING = ROOT / "records/studies/state-tracking.json.gz"
QLORA = ROOT / "records/studies/qlora-curve.json"
GRANITE_MICRO = ROOT / "benchmarks/shapes/granite-4.0-h-micro.json"
METHOD_FAMILIES = ROOT / "src/ssmtune/assets/method_families.json"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@lru_cache
def usable_methods() -> dict[str, dict[str, str]]:
    """Family -> method that it can take -> group of the components that the method edits there."""
    found: dict[str, dict[str, str]] = {}
    for name in family_names():
        configs = get_family(name).tiny_configs().values()
        components = [c for config in configs for c in take_inventory(weightless(config)).everything]
        found[name] = {}
        for method in method_names():
            groups = [c.role if c.role in POSITIONS else c.group for c in components if get_method(method).allows(c)]
            if groups:
                found[name][method] = groups[0]
    return found


def families() -> str:
    """Which family can take which method: a method is usable where one of its roles exists."""
    methods = list(method_names())
    rows = []
    for name, usable in usable_methods().items():
        cells = ["yes" if method in usable else "-" for method in methods]
        rows.append([*family_cells(name), *cells])
    return table(["family", "model types", "topology", *methods], rows)


def families_by_kind() -> str:
    """The same by what a method edits: a kind is marked where all of its methods apply, else those that do are named."""
    kinds: dict[str, list[str]] = {"weights": [], "core": [], "state": [], "block": [], "prompt": []}
    for method in method_names():
        groups = {usable[method] for usable in usable_methods().values() if method in usable}
        kind = next((k for k in ("core", "state", "block") if k in groups), "weights")
        kinds["prompt" if groups & POSITIONS else kind].append(method)
    rows = []
    for name, usable in usable_methods().items():
        cells = []
        for methods in kinds.values():
            there = [f"`{method}`" for method in methods if method in usable]
            cells.append("yes" if len(there) == len(methods) else ", ".join(there) or "-")
        rows.append([*family_cells(name), *cells])
    words = "; ".join(f"{kind}: {', '.join(f'`{method}`' for method in methods)}" for kind, methods in kinds.items())
    return f"{words}.\n\n" + table(["family", "model types", "topology", *kinds], rows)


def family_cells(name: str) -> list[str]:
    """A family's name, model types and topology."""
    family = get_family(name)
    return [name, ", ".join(f"`{t}`" for t in family.model_types), family.topology]


def roles() -> str:
    """Every role of every family with its group and how the model uses it."""
    rows = []
    for name in family_names():
        for claim in get_family(name).claims:
            parts = "" if claim.rows is None else "split into named row ranges"
            rows.append([name, f"`{claim.role}`", claim.group, f"`{claim.path}`", parts])
    return table(["family", "role", "group", "tensor", "rows"], rows)


def method_families() -> dict[str, list[str]]:
    """Which families have a component that a method can edit: the table that `ssmtune methods` reads."""
    usable: dict[str, list[str]] = {method: [] for method in method_names()}
    for name in family_names():
        inventories = [take_inventory(weightless(config)) for config in get_family(name).tiny_configs().values()]
        for method, members in usable.items():
            if any(get_method(method).allows(c) for inventory in inventories for c in inventory.everything):
                members.append(name)
    return usable


def methods() -> str:
    """What each method trains and costs."""
    rows = []
    for name in method_names():
        method = get_method(name)
        mergeable = "yes" if method.mergeable else "no"
        recipes = ", ".join(f"`{recipe}`" for recipe in sorted(method.recipes))
        rows.append([f"`{name}`", method.summary, method.formula, mergeable, method.overhead, recipes, method.source])
    return table(["method", "trains", "parameters per site", "mergeable", "overhead", "own recipes", "source"], rows)


def checks() -> str:
    """What each check of `verify` proves."""
    return table(["check", "proves"], [[f"`{name}`", get_check(name).proves] for name in check_names()])


def tasks() -> str:
    """The tasks with their kind, metrics and terms."""
    rows = []
    for row in task_rows(None):
        metrics = [f"**{m}**" if m == row["primary"] else m for m in row["metrics"]] + [
            f"*{m}*" for m in row["corpus_metrics"]
        ]
        chance = "-" if row["chance"] is None else f"{row['chance']:.3g}"
        source = "drawn" if row["drawn"] else f"`{row['folder']}`"
        version, licence = str(row["version"]), row["licence"]
        rows.append([f"`{row['name']}`", version, row["kind"], ", ".join(metrics) or "-", chance, source, licence])
    headings = ["task", "version", "kind", "metrics (primary in bold, of all answers in italics)", "chance"]
    return table([*headings, "set", "licence"], rows)


def task_pages() -> str:
    """What each task's own file says: what it is, a question, how an answer is read, where the set comes from."""
    return "\n\n".join(task_page(name) for name in task_names())


def task_page(name: str) -> str:
    """One task."""
    task = get_task(name)
    example = min(sample_examples(task), key=lambda e: len(e.input) + len(e.output))
    prompt, answer = messages(example)
    shown = "\n".join(f"{m['role']}: {m['content']}" for m in [*prompt, *answer])
    extra = [stop for stop in task.stops if stop not in STOPS]
    facts = [f"at most {task.max_new_tokens} tokens"]
    facts += [f"also stops at {', '.join(f'`{stop!r}`' for stop in extra)}"] if extra else []
    lines = [f"### {name}", inspect.getdoc(sys.modules[f"ssmtune.tasks.{name}"]) or ""]
    lines.append(f"```text\n{shown}\n```")
    if isinstance(task, SourcedTask):
        sides = [*(["train"] if task.trained else []), *([task.test_split] if task.tested else [])]
        facts.append(f"reads {' and '.join(f'`{side}`' for side in sides)} of `{task.folder}`")
        if task.hub is not None:
            facts.append(f"on the hub: `{task.hub.path}`" + (f", `{task.hub.config}`" if task.hub.config else ""))
        facts.append(f"licence: {task.terms}")
    elif isinstance(task, SequenceTask):
        lengths = [", ".join(map(str, sizes)) for sizes in (task.train_lengths, task.test_lengths)]
        facts.append(f"{task.num_train:,} examples of lengths {lengths[0]} to train on")
        facts.append(f"{task.num_test} of each length {lengths[1]} to test")
    else:
        assert isinstance(task, GeneratedTask)
        facts.append(f"{task.full_size:,} examples at size 1")
    lines.append("; ".join(facts) + ".")
    return "\n\n".join(lines)


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


def operation_records() -> list[dict[str, Any]]:
    """The records of the kernels on a GPU."""
    records = [read_record(path, kind="benchmark") for path in sorted(BENCH.glob("operations-*.json"))]
    return [record for record in records if record["config"]["benchmark"] == "operations"]


def newest_operations(part: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What the newest record that measured it says of each operation: the record and its entry, by name."""
    records = sorted(operation_records(), key=lambda record: str(record["created"]))
    return {name: (record, entry) for record in records for name, entry in record[part].items()}


def bench_operations() -> str:
    """Time and memory of the kernels beside the reference."""
    rows = []
    for operation, (record, sides) in newest_operations("timings").items():
        for backend, entry in sides.items():
            both = "" if entry["both_ms"] is None else f"{entry['both_ms']:.2f} ms"
            memory = f"{entry['memory_bytes'] / 2**20:,.0f} MiB"
            device = record["environment"]["device"]
            rows.append([f"`{operation}`", backend, device, f"{entry['forward_ms']:.2f} ms", both, memory])
    return table(["operation", "backend", "device", "forward", "forward and backward", "memory"], rows)


def bench_parity() -> str:
    """The tensor of each operation and precision whose error is furthest beyond the reference's."""
    rows = []
    found = {name: entry for name, (_, entry) in newest_operations("parity").items()}
    for group in dict.fromkeys(name.rpartition("/")[0] for name in found):
        if group.startswith("mamba_ssm"):
            continue
        entries = [e for name, e in found.items() if name.startswith(group + "/")]
        worst = max(entries, key=lambda e: e["excess"])
        num = sum(e["cases"] for e in entries)
        errors = [f"{worst[key]:.1e}" for key in ("error", "reference", "allowed")]
        rows.append([group, str(num), worst["tensor"], *errors, worst["where"]])
    headings = ["operation", "cases", "worst tensor", "relative error", "the reference's", "allowed beyond it", "where"]
    return table(headings, rows)


def bench_scan_beside() -> str:
    """The largest error of mamba_ssm's scan and of ours on the same inputs."""
    rows = [
        [name.split("/")[1], name.split("/")[2], f"{entry['ours']:.1e}", f"{entry['error']:.1e}"]
        for name, (_, entry) in newest_operations("parity").items()
        if name.startswith("mamba_ssm")
    ]
    return table(["precision", "batch, steps, heads, width, groups, state", "ours", "mamba_ssm"], rows)


def bench_cpu() -> str:
    """Time of the recurrent layers on a CPU on both sides, and how busy the machine was."""
    record = read_record(CPU, kind="benchmark")
    rows = []
    for label, layer in record["layers"].items():
        for steps, sides in layer["speed"].items():
            row = [label, str(layer["width"]), f"1 x {int(steps):,}"]
            for what in ("forward_ms", "both_ms"):
                found = [sides[side][what] for side in ("ours", "theirs")]
                row += [f"{f['median']:,.1f} ({f['fastest']:,.1f}-{f['slowest']:,.1f})" for f in found]
                row.append(f"{found[1]['median'] / found[0]['median']:.1f}")
            rows.append(row)
    sides = ["ssmtune, ms", "transformers, ms", "times as fast"]
    both = [f"both: {side}" for side in sides]
    busy = " before, ".join(f"{record['load_average'][when][0]:.1f}" for when in ("before", "after"))
    clock = record["config"].get("clock", "wall")
    facts = f"{record['environment']['device']}, {record['config']['dtype']}, {clock} clock; load average {busy} after."
    return table(["layer", "width", "tokens", *(f"forward: {side}" for side in sides), *both], rows) + f"\n\n{facts}"


def bench_cpu_memory() -> str:
    """Parity and peak memory of the same layers."""
    record = read_record(CPU, kind="benchmark")
    rows = []
    for label, layer in record["layers"].items():
        errors = [f"{layer['parity'][side]['error']:.1e}" for side in ("ours", "theirs")]
        added = [f"{layer['memory'][side]['added_bytes'] / 2**20:,.0f} MiB" for side in ("ours", "theirs")]
        long = [f"{layer['memory_long'][key] / 2**20:,.0f} MiB" for key in ("added_bytes", "process_bytes")]
        rows.append([label, str(layer["parity"]["tensors"]), *errors, *added, *long])
    first, longest = record["config"]["lengths"][0], record["config"]["long"]
    errors = ["worst error: ssmtune", "transformers"]
    added = [f"added at {first:,}: ssmtune", "transformers"]
    long = [f"ssmtune at {longest:,} tokens, width {record['config']['long_width']}: added", "whole process"]
    return table(["layer", "tensors compared", *errors, *added, *long], rows)


def planted_faults() -> str:
    """Every planted fault, what names it, and where it is planted."""
    sys.path.insert(0, str(ROOT / "tests/faults"))
    from planted import PLANTED

    rows = [
        [row.fault, "yes" if row.published else "", f"`{row.named_by}`", ", ".join(row.families), f"`{row.test}`"]
        for row in PLANTED
    ]
    return table(["fault", "published", "named by", "planted in", "test"], rows)


def export_targets() -> str:
    """What each target of `export` writes and proves."""
    rows = []
    for name in target_names():
        target = get_target(name)
        options = ", ".join(f"`--{option.replace('_', '-')}`" for option in sorted(target.options))
        rows.append([f"`{name}`", target.writes, target.proves, options])
    return table(["target", "writes", "proves", "options"], rows)


def gguf_families() -> str:
    """Which families become a GGUF file, and how near llama.cpp's log-probabilities are to transformers'."""
    record = read_record(GGUF, kind="export")
    types = record["config"]["types"]
    rows = []
    for row in record["rows"]:
        checks = row["types"]
        figures = [
            f"{checks[t]['max_abs_logprob' if t == 'f32' else 'mean_kl']:.1e}" if t in checks else "-" for t in types
        ]
        words = []
        if row.get("restored"):
            words.append(f"converter is told {', '.join(f'`{name}`' for name in row['restored'])}")
        if row["refused"]:
            words.append(row["refused"])
        elif not row["ok"]:
            words.append(next(check["detail"] for check in checks.values() if not check["ok"]))
        gelu = checks.get("f32", {}).get("gelu_table")
        if gelu and row["ok"]:
            words.append(checks["f32"]["detail"])
        matches = "refused" if row["refused"] or not row["ok"] else "yes, but for GELU" if gelu else "yes"
        rows.append([row["name"], matches, *figures, "; ".join(words) or "-"])
    figures = [f"{t}: {'largest difference' if t == 'f32' else 'mean divergence'}, nats" for t in types]
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items())
    return table(["family", "matches", *figures, "remarks"], rows) + f"\n\nPackages: {packages}."


def hankel_step() -> str:
    """CPU time of a step with branches, as a share of LoRA's."""
    record = read_record(HANKEL_STEP, kind="benchmark")
    timings = record["timings_by_length"]
    lengths = list(timings["lora"])
    rows = []
    for side, found in timings.items():
        cells = [f"{found[n]['median'] * 1000:,.0f} ms ({found[n]['of_lora']:.2f})" for n in lengths]
        rows.append([side, f"{record['num_trained'][side]:,}", *cells])
    parity = "; ".join(f"{name} {error:.1e}" for name, error in record["parity"].items())
    config = record["config"]
    return (
        table(["side", "trained", *(f"T = {int(n):,}" for n in lengths)], rows)
        + f"\n\nMedian of a forward and backward pass of one row (in brackets: share of LoRA's), {config['num_layers']} "
        f"layers of width {config['width']}, branches of order {config['order']}, LoRA of rank {config['rank']} on `mlp.down`. "
        f"Error of the fp32 states against fp64 steps, over {int(lengths[-1]):,} of them: {parity}."
    )


def tracking_setting() -> str:
    """Sizes of the study, and what each arm trained."""
    record = read_record(TRACKING, kind="synthetic")
    config = record["config"]
    rows = []
    for arm in dict.fromkeys(cell["arm"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["arm"] == arm]
        counts = sorted({cell["num_trained"] for cell in cells})
        orders = sorted({order for cell in cells for order in cell.get("orders", [])})
        rows.append(
            [
                f"`{arm}`",
                "-" if counts == [0] else f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else ""),
                f"{orders[0]} to {orders[-1]} of {config['order']}" if orders else "-",
            ]
        )
    lines = (
        f"{len(config['seeds'])} seeds; {config['num_steps']} steps of {config['batch_rows']} rows of "
        f"{config['train_length']} (text: {config['text_steps']} of {config['text_rows']} of {config['text_length']}) "
        f"after {config['pretrain_steps']} of pretraining; width {config['width']}; "
        f"{config['test_rows']} test rows, the last {config['scored_steps']} steps scored; "
        f"tasks run: {', '.join(config['tasks'])}; {record['cpu_seconds']:.0f} s of CPU time in the reported cells."
    )
    return lines + "\n\n" + table(["arm", "trained parameters", "order after truncation"], rows)


def tracking_training() -> str:
    """Loss at the end of training of each arm and task, and the rate that was chosen."""
    record = read_record(TRACKING, kind="synthetic")
    names = record["config"]["tasks"]
    rows = []
    for arm in dict.fromkeys(cell["arm"] for cell in record["cells"]):
        row = [f"`{arm}`"]
        for task in names:
            cells = [cell for cell in record["cells"] if (cell["arm"], cell["task"]) == (arm, task)]
            losses = [cell["loss"] for cell in cells]
            text = f"{statistics.mean(losses):.3f}"
            if "rate" in cells[0]:
                rate, tried = cells[0]["rate"], sorted(float(name) for name in cells[0]["tuning"])
                edge = " (largest)" if rate == tried[-1] else " (smallest)" if rate == tried[0] else ""
                text += f" [{min(losses):.3f}, {max(losses):.3f}] at {rate:g}{edge}"
            row.append(text)
        rows.append(row)
    return table(["arm", *names], rows)


def tracking_means() -> str:
    """Mean and interval of each arm, by task and length."""
    record = read_record(TRACKING, kind="synthetic")
    parts = []
    for task in record["config"]["tasks"]:
        found = [entry for entry in record["means"] if entry["task"] == task]
        lengths = list(dict.fromkeys(entry["length"] for entry in found))
        rows = []
        for arm in dict.fromkeys(entry["arm"] for entry in found):
            cells = {entry["length"]: entry for entry in found if entry["arm"] == arm}
            rows.append(
                [
                    f"`{arm}`",
                    *(f"{cells[n]['mean']:.3f} [{cells[n]['low']:.3f}, {cells[n]['high']:.3f}]" for n in lengths),
                ]
            )
        metric = record["metrics"][task]
        parts.append(f"### {task}: {metric}\n\n" + table(["arm", *(f"T = {n}" for n in lengths)], rows))
    return "\n\n".join(parts)


def tracking_comparisons() -> str:
    """Every declared comparison with its interval and verdict."""
    record = read_record(TRACKING, kind="synthetic")
    rows = [
        [
            entry["task"],
            f"`{entry['arm']}` - `{entry['baseline']}`",
            f"{entry['difference']:+.3f} [{entry['low']:+.3f}, {entry['high']:+.3f}]",
            f"{entry['p_holm']:.3f}",
            f"{entry['seeds_same_sign']} of {entry['seeds_compared']}",
            entry["verdict"],
        ]
        for entry in record["comparisons"]
    ]
    headings = ["task and length", "comparison", "difference", "p (Holm)", "seeds of that sign", "verdict"]
    return table(headings, rows) + f"\n\n{len(rows)} comparisons; {record['method']}."


def s4_setup() -> str:
    """Sizes of the regression study, as it was run."""
    record = read_record(S4_REGRESSION, kind="synthetic")
    rows = [
        [f"`{key}`", ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in record["config"].items()
        if key != "comparisons"
    ]
    rows.append(["device", record["environment"]["device"]])
    rows.append(["time", f"{record['seconds']:.0f} s"])
    return table(["", ""], rows)


def s4_arms() -> str:
    """Error of each arm of the regression study, in powers of ten and as a factor of the frozen model's."""
    record = read_record(S4_REGRESSION, kind="synthetic")
    frozen = record["frozen"]["mean"]
    rows = [["frozen", "0", "", "", interval_cell(record["frozen"]), "1"]]
    for name, arm in record["arms"].items():
        counts = ", ".join(f"{method} {num:,}" for method, num in arm["by_method"].items() if num)
        factor = f"{10 ** (arm['mean']['mean'] - frozen):.3f}"
        rows.append([name, f"{arm['trained']:,}", counts, f"{arm['rate']:g}", interval_cell(arm["mean"]), factor])
    return table(["arm", "trained", "of which", "rate", "log10 error", "error over the frozen model's"], rows)


def interval_cell(interval: dict[str, Any]) -> str:
    """A mean with its interval over seeds."""
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def s4_comparisons() -> str:
    """The declared comparisons of the regression study; the ratio of errors is 10 to the difference."""
    rows = []
    for c in read_record(S4_REGRESSION, kind="synthetic")["comparisons"]:
        ratio = [f"{10 ** c[key]:.2f}" for key in ("difference", "low", "high")]
        seeds = f"{c['seeds_same_sign']} of {c['seeds_compared']}"
        verdict = c["verdict"] if c["verdict"] == "no difference" else f"{c['verdict']} error"
        rows.append(
            [
                f"{c['arm']} against {c['baseline']}",
                f"{ratio[0]} [{ratio[1]}, {ratio[2]}]",
                seeds,
                f"{c['p_holm']:.3f}",
                verdict,
            ]
        )
    return table(["comparison", "ratio of errors", "seeds of that sign", "p (Holm)", "verdict"], rows)


def s4_rates() -> str:
    """log10 error on the tuning seeds by learning rate; the chosen one in bold."""
    arms = read_record(S4_REGRESSION, kind="synthetic")["arms"]
    rates = list(next(iter(arms.values()))["rates"])
    rows = [
        [name, *(f"**{arm['rates'][r]:.3f}**" if float(r) == arm["rate"] else f"{arm['rates'][r]:.3f}" for r in rates)]
        for name, arm in arms.items()
    ]
    return table(["arm", *rates], rows)


def qlora_bytes() -> str:
    """Bytes of each role of Granite-4.0-H-Micro with the default quantize block, largest first."""
    found = summary(choose(empty_model(str(GRANITE_MICRO)), QuantizeConfig()), QuantizeConfig())
    megabyte = 1e6
    rows = [
        [
            f"`{row['role']}`",
            f"{row['bytes_before'] / megabyte:,.1f}",
            f"{row['bytes_after'] / megabyte:,.1f}",
            row["reason"],
        ]
        for row in sorted(found["roles"], key=lambda row: -row["bytes_before"])
        if row["bytes_before"] >= megabyte
    ]
    rows.append(["all", *(f"{found[key] / megabyte:,.1f}" for key in ("bytes_before", "bytes_after")), ""])
    return table(["role", "MB", "MB with 4 bits", "why not in 4 bits"], rows)


def qlora_setting() -> str:
    """What the arms of the 4-bit comparison share."""
    record = read_record(QLORA, kind="synthetic")
    rows = [[f"`{key}`", str(value)] for key, value in record["config"].items() if key != "arms"]
    rows.append(["device", record["environment"]["device"]])
    rows.append(["CPU time", f"{record['cpu_seconds']:.0f} s"])
    return table(["", ""], rows)


def qlora_curve() -> str:
    """Training loss of each arm in four stretches, and how far its steps are from those in full precision."""
    arms = read_record(QLORA, kind="synthetic")["arms"]
    num = len(next(iter(arms.values()))["losses"][0])
    bounds = [round(part * num / 4) for part in range(5)]
    stretches = list(zip(bounds, bounds[1:], strict=False))
    reference = next(iter(arms.values()))["losses"]
    rows = []
    for name, arm in arms.items():
        means = [statistics.mean(x for losses in arm["losses"] for x in losses[a:b]) for a, b in stretches]
        pairs = [
            (x, y) for one, two in zip(arm["losses"], reference, strict=True) for x, y in zip(one, two, strict=True)
        ]
        distance = statistics.mean(abs(x - y) for x, y in pairs)
        rows.append([name, *(f"{mean:.3f}" for mean in means), f"{distance:.3f}"])
    return table(["arm", *(f"steps {a + 1}-{b}" for a, b in stretches), "distance"], rows)


def qlora_held_out() -> str:
    """Held-out loss of each arm before and after training, as trained and on the original weights."""
    record = read_record(QLORA, kind="synthetic")
    differences = {(c["arm"], c["base"]): c for c in record["comparisons"]}
    rows = []
    for name, arm in record["arms"].items():
        for base, interval in arm["mean"].items():
            found = differences.get((name, base))
            difference = (
                "" if found is None else f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
            )
            held = arm["weights"]
            share = "" if held is None or base == "merged" else f"{held['bytes_after'] / held['bytes_before']:.0%}"
            untrained = f"{arm['untrained']:.3f}" if base == "as trained" else ""
            rows.append([name, base, share, untrained, interval_cell(interval), difference])
    headings = ["arm", "base", "bytes of the weights", "untrained", "trained", "difference to full precision"]
    return table(headings, rows)


def merge_cost() -> str:
    """What merging a model of full size costs, beside a copy of its files."""
    record = read_record(MERGE, kind="export")
    merged, copies = record["merge"], record["copies"]
    gb = 1e9
    rows = [
        [
            "copy",
            f"{record['bytes'] / gb:.2f}",
            f"{min(c['seconds'] for c in copies):.0f} to {max(c['seconds'] for c in copies):.0f}",
            f"{min(c['cpu_seconds'] for c in copies):.0f} to {max(c['cpu_seconds'] for c in copies):.0f}",
            "-",
        ],
        [
            f"merge, `{record['config']['recipe']}`, rank {record['config']['rank']}",
            f"{record['bytes'] / gb:.2f}",
            f"{merged['seconds']:.0f}",
            f"{merged['cpu_seconds']:.0f}",
            f"{merged['peak_rss_bytes'] / gb:.2f}",
        ],
    ]
    words = (
        f"{record['total']:,} parameters, {merged['edited']} of the tensors edited; {merged['import_rss_bytes'] / gb:.2f} GB "
        f"of the memory is Python, torch and transformers before the merge begins. Measured once on "
        f"{record['environment']['device']}, load average {record['load_average']:.1f}."
    )
    return table(["", "GB", "seconds", "processor seconds", "peak resident memory, GB"], rows) + "\n\n" + words


def statistics_setting() -> str:
    """How many data sets each row of the tables is from."""
    config = read_record(STATISTICS)["config"]
    return (
        f"{config['num']:,} data sets for each row, {config['num_resamples']:,} resamples; "
        "in brackets the interval of 95 % of the share itself."
    )


def statistics_table(name: str, headings: dict[str, str], outcome: str, extra: dict[str, str] | None = None) -> str:
    """One table of the simulations: the designs' settings, the share that was found, and further figures."""
    rows = []
    for row in read_record(STATISTICS)[name]:
        found = f"{100 * row['share']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        rows.append([*(f"{row[key]:g}" for key in headings), found, *(f"{row[key]:.3f}" for key in extra or {})])
    return table([*headings.values(), outcome, *(extra or {}).values()], rows)


SIZES = {"seeds": "seeds", "examples": "examples"}
SPREADS = {"sd_seed": "sd between seeds", "sd_example": "between examples", "sd_noise": "of the rest"}
LOGITS = {"logit": "log-odds", "shift": "difference", "sd_seed_logit": "sd between seeds"}


def beside(module: str, name: str) -> Callable[[], str]:
    """A function of a module in this folder, imported when it is asked for."""

    def render() -> str:
        sys.path.insert(0, str(ROOT / "recipes"))
        text: str = vars(importlib.import_module(module))[name]()
        return text

    return render


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": study_headline, "families": families_by_kind},
    "docs/families.md": {"families": families, "roles": roles},
    "docs/methods/README.md": {"methods": methods},
    "docs/verify.md": {"checks": checks, "faults": planted_faults},
    "docs/export.md": {"targets": export_targets, "gguf": gguf_families, "merge": merge_cost},
    "docs/tasks.md": {"tasks": tasks, "task-pages": task_pages},
    "docs/tiny-granite-h.md": {"facts": pretrain_facts, "samples": pretrain_samples},
    "docs/performance.md": {
        **{
            name: beside("speed_tables", name)
            for name in (
                "steps",
                "components",
                "lengths",
                "packed",
                "qlora",
                "curve",
                "exactness",
                "small_terms",
                "profile",
                "kernels",
            )
        },
        "operations": bench_operations,
        "parity": bench_parity,
        "beside": bench_scan_beside,
        "cpu": bench_cpu,
        "cpu-memory": bench_cpu_memory,
    },
    "docs/claims.md": {"claims": beside("claims", "claims_markdown")},
    "docs/matched-sisters.md": {"sisters": beside("sisters_table", "sisters_markdown")},
    "docs/studies/placement.md": {
        "arms": beside("study_tables", "placement_arms"),
        "transfer": beside("study_tables", "placement_transfer"),
        "comparisons": beside("study_tables", "placement_comparisons"),
    },
    "docs/studies/methods.md": {
        "arms": beside("study_tables", "methods_arms"),
        "comparisons": beside("study_tables", "methods_comparisons"),
        "side-effects": beside("study_tables", "side_effects_means"),
        "side-effect-comparisons": beside("study_tables", "side_effects_comparisons"),
    },
    "docs/studies/s4-regression.md": {
        "setup": s4_setup,
        "arms": s4_arms,
        "comparisons": s4_comparisons,
        "rates": s4_rates,
    },
    "docs/studies/granite.md": {"study": study_tables, "core": core_movement},
    "docs/methods/hankel.md": {"hankel-step": hankel_step},
    "docs/methods/qlora.md": {
        "qlora-bytes": qlora_bytes,
        "qlora-setting": qlora_setting,
        "qlora-curve": qlora_curve,
        "qlora-held-out": qlora_held_out,
    },
    "docs/statistics.md": {
        "statistics-setting": statistics_setting,
        "statistics-normal": lambda: statistics_table(
            "normal", SIZES | SPREADS, "intervals that hold the truth", {"mean_width": "mean width"}
        ),
        "statistics-binary": lambda: statistics_table(
            "binary", SIZES | LOGITS, "intervals that hold the truth", {"mean_width": "mean width"}
        ),
        "statistics-families": lambda: statistics_table(
            "families",
            {"comparisons": "comparisons", **SIZES, "sd_seed_logit": "sd of log-odds between seeds"},
            "families with a finding",
        ),
        "statistics-nulls": lambda: statistics_table(
            "nulls", {"draws": "draws", "sd_draw": "sd between draws", **SIZES}, "found to differ"
        ),
        "statistics-powers": lambda: statistics_table(
            "powers", {"comparisons": "comparisons", **SIZES, **SPREADS}, "found", {"effect": "effect stated"}
        ),
    },
    "docs/studies/state-tracking.md": {
        "setting": tracking_setting,
        "training": tracking_training,
        "means": tracking_means,
        "comparisons": tracking_comparisons,
    },
}


def main() -> int:
    """Render every part; with --check, say which pages were out of date and fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a page was out of date")
    arguments = parser.parse_args()
    stale = []
    shipped = json.dumps(method_families(), indent=1) + "\n"
    if METHOD_FAMILIES.read_text(encoding="utf-8") != shipped:
        stale.append(str(METHOD_FAMILIES.relative_to(ROOT)))
        if not arguments.check:
            METHOD_FAMILIES.write_text(shipped, encoding="utf-8")
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
