"""What training did to everything else: held-out bits per byte and recall of the adapters that a study left behind.

    python recipes/study_side_effects.py recipes/studies/methods.yaml --data DIR --out records/studies/side-effects.json.gz

DIR holds what `pretrain.py pack` wrote. `--workers` processes measure side by side; each measurement is kept at once in
`--parts`, and those of the same code are not made again. After `--seconds` the record says what is missing; the arms that
claims and declared comparisons need come first, task by task, and an arm enters a table with all of its seeds or not at all.
Both measures are likelihoods of plain text, so neither needs the form of an
answer: bits per byte of held-out text, and whether the right one of four numbers is the likeliest after
"The code of the NAME is", where the text gave NAME's number some lines before.
Every arm is compared with the base, and the arm without new query and key projections with the one that has them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretrain import read_tokens
from torch import Tensor

from ssmtune.config import load_yaml
from ssmtune.errors import RecordError
from ssmtune.evaluate import EvaluateConfig, evaluation_model
from ssmtune.models import load_tokenizer
from ssmtune.records import environment, new_record, read_record, write_json
from ssmtune.stats import METHOD, Comparison, holm, mean_interval, paired_difference
from ssmtune.study_cells import Cell, StudyConfig, expand
from ssmtune.study_runs import study_inputs
from ssmtune.workers import Job, local_slots, run_jobs

WINDOW = 1024
NUM_WINDOWS = 48
RECALL_LENGTHS = (8, 24, 64)
NUM_QUESTIONS = 40
BATCH_TOKENS = 1 << 13
"""The logits of a batch are this times the vocabulary, in fp32: half a gigabyte, of which several processes share a GPU."""
JOB_SECONDS = 180
BASE = "base"
EXTRA = (("lora.qk.frozen", "lora"),)
"""Comparisons beside those with the base, where a study has both arms."""
FACTS = ("model", "arm", "task", "seed")
FIRST = (BASE, "initial.state", "lora", "lora.qk.frozen")
"""Arms that a claim or `EXTRA` is about: measured before the others of their task."""


SETTINGS = {
    "window": WINDOW,
    "num_windows": NUM_WINDOWS,
    "recall_lengths": list(RECALL_LENGTHS),
    "num_questions": NUM_QUESTIONS,
}


@functools.cache
def held_out_windows(data_path: Path) -> tuple[Tensor, list[int]]:
    """Return the first windows of the held-out text [n, WINDOW + 1], and how many bytes each one's targets are."""
    manifest = json.loads((data_path / "manifest.json").read_text(encoding="utf-8"))
    tokens = torch.from_numpy(read_tokens(data_path, manifest["arrays"]["valid"]).astype(np.int64))
    windows = tokens[: NUM_WINDOWS * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)
    tokenizer = load_tokenizer("tiny-granite-h")
    return windows, [len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=True).encode()) for row in windows]


@functools.cache
def questions() -> list[tuple[int, str, list[str], int]]:
    """Return (lines, text that ends before the number, four numbers, which one is right), the same at every call."""
    from ssmtune.tasks.needle import draw

    found = []
    for length in RECALL_LENGTHS:
        for number in range(NUM_QUESTIONS):
            text, answer = draw(length, random.Random(f"side-effects:{length}:{number}"))
            lines, _, asked = text.rpartition("\n\n")
            codes = re.findall(r"^The code of the .* is (\d+)\.$", lines, re.MULTILINE)
            name = re.fullmatch(r"What is the code of the (.*)\?", asked)
            assert name is not None and answer in codes, text
            found.append((length, f"{lines}\nThe code of the {name[1]} is", codes, codes.index(answer)))
    return found


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[list[int]], starts: list[int], pad: int) -> list[float]:
    """Return the summed log-probability of each row's tokens from `starts` on; rows are padded on the right."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    while order:
        size = max(1, BATCH_TOKENS // len(rows[order[-1]]))
        batch, order = order[-size:], order[:-size]
        longest = max(len(rows[i]) for i in batch)
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        for k, i in enumerate(batch):
            ids[k, : len(rows[i])] = torch.tensor(rows[i])
        ids = ids.to(model.device)
        # Padding lies behind every token that is scored, where a causal model cannot see it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(batch), -1).cpu()
        for k, i in enumerate(batch):
            found[i] = -float(nats[k, starts[i] - 1 : len(rows[i]) - 1].sum())
    return found


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Return bits per byte of each window, and whether each question was answered right, of one model or adapter.

    It is read from its part where the same code has measured it already, and written there otherwise.
    """
    part = Path(argument["part"])
    settings = {**SETTINGS, **{key: argument[key] for key in FACTS}}
    with contextlib.suppress(RecordError):
        kept = read_record(part, kind="synthetic")
        if kept["config"] == settings and kept["environment"]["code"] == environment()["code"]:
            return {key: kept[key] for key in ("bits_per_byte", "recall")} | {"device": kept["environment"]["device"]}
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(argument["model"])
    model = evaluation_model(EvaluateConfig(model=argument["model"], task="needle", adapter=argument["adapter"]))
    windows, num_bytes = held_out_windows(Path(argument["data"]))
    pad = tokenizer.pad_token_id
    nats = log_likelihoods(model, [row.tolist() for row in windows], [1] * len(windows), pad)
    rows, starts, asked = [], [], questions()
    for _, text, codes, _ in asked:
        given = tokenizer(text, add_special_tokens=False)["input_ids"]
        for code in codes:
            rows.append(given + tokenizer(f" {code}", add_special_tokens=False)["input_ids"])
            starts.append(len(given))
    scores = np.array(log_likelihoods(model, rows, starts, pad)).reshape(len(asked), -1)
    right = scores.argmax(axis=1) == [entry[3] for entry in asked]
    found = {
        "bits_per_byte": [-n / math.log(2) / size for n, size in zip(nats, num_bytes, strict=True)],
        "recall": [float(value) for value in right],
    }
    record = new_record("synthetic", config=settings, **found)
    write_json(part, record)
    return found | {"device": record["environment"]["device"]}


def jobs_of(cells: list[Cell], data: str, parts: Path) -> tuple[list[Job[dict[str, Any]]], list[dict[str, Any]]]:
    """Return the base of each model once and every trained cell whose adapter is there, and the facts of those without.

    In the order in which a cut costs least: base, then task by task, the arms of `FIRST` first, all seeds of an arm.
    """
    jobs: dict[str, Job[dict[str, Any]]] = {}
    missing = []
    for cell in cells:
        spec = cell.spec
        facts = {"model": spec.model, "arm": BASE, "task": "", "seed": 0}
        places = {"adapter": None, "data": data, "part": str(parts / f"base-{Path(spec.model).name}.json.gz")}
        jobs.setdefault(f"{spec.model}:base", Job(key=f"{spec.model}:base", argument={**facts, **places}))
        if spec.recipe is None or spec.rates or spec.draw is not None:
            continue
        facts |= {"arm": spec.cell, "task": spec.task, "seed": spec.seed}
        adapter = Path(spec.run_dir) / "adapter"
        is_done = cell.path.exists() and read_record(cell.path)["status"] in ("done", "provisional")
        if not is_done or not adapter.is_dir():
            missing.append(facts)
            continue
        places = {"adapter": str(adapter), "data": data, "part": str(parts / f"{cell.digest}.json.gz")}
        jobs[cell.digest] = Job(key=cell.digest, argument={**facts, **places})
    tasks = list(dict.fromkeys(job.argument["task"] for job in jobs.values()))
    arms = list(dict.fromkeys([*FIRST, *(job.argument["arm"] for job in jobs.values())]))

    def turn(job: Job[dict[str, Any]]) -> tuple[int, int, int]:
        facts = job.argument
        return tasks.index(facts["task"]), arms.index(facts["arm"]), facts["seed"]

    return sorted(jobs.values(), key=turn), missing


def complete(cells: list[dict[str, Any]], missing: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of those arms and tasks of which no seed is missing."""
    lacking = {(facts["model"], facts["arm"], facts["task"]) for facts in missing}
    return [cell for cell in cells if (cell["model"], cell["arm"], cell["task"]) not in lacking]


def compare(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every arm against its base, and `EXTRA`, per model and trained task, over the seeds both have; Holm over all."""
    found = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        for task in dict.fromkeys(cell["task"] for cell in own if cell["task"]):
            arms = dict.fromkeys(cell["arm"] for cell in own if cell["task"] == task)
            for arm, baseline in [(arm, BASE) for arm in arms] + [pair for pair in EXTRA if set(pair) <= set(arms)]:
                for metric in ("bits_per_byte", "recall"):
                    one = {c["seed"]: c[metric] for c in own if (c["arm"], c["task"]) == (arm, task)}
                    two = {c["seed"]: c[metric] for c in own if (c["arm"], c["task"]) == (baseline, task)}
                    base = [c[metric] for c in own if c["arm"] == BASE]
                    seeds = sorted(one.keys() & two.keys()) if baseline != BASE else sorted(one)
                    other = [two[seed] for seed in seeds] if baseline != BASE else base
                    result = paired_difference(np.array([one[seed] for seed in seeds]), np.array(other), seed=0)
                    found.append((model, task, arm, baseline, metric, result))
    adjusted = holm([entry[-1].p for entry in found])
    return [
        {
            "model": model,
            **Comparison(arm=arm, baseline=baseline, task=task, metric=metric, result=result, p_holm=p).to_dict(),
        }
        for (model, task, arm, baseline, metric, result), p in zip(found, adjusted, strict=True)
    ]


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each model, arm and trained task, with its interval."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["arm"], cell["task"]), []).append(cell)
    return [
        {
            "model": model,
            "arm": arm,
            "task": task,
            **{
                metric: mean_interval([float(np.mean(cell[metric])) for cell in members]).to_dict()
                for metric in ("bits_per_byte", "recall")
            },
        }
        for (model, arm, task), members in groups.items()
    ]


def main() -> None:
    """Measure every adapter of the study and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that 'pretrain.py pack' wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="", help="GPU numbers, comma-separated")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--parts", type=Path, help="where measurements are kept; by default beside the study's cells")
    parser.add_argument("--seconds", type=float, default=math.inf, help="write what is done after this long")
    arguments = parser.parse_args()
    started = time.monotonic()
    config = load_yaml(StudyConfig, arguments.study)
    record = new_record("synthetic", config={"study": config.name, **SETTINGS})
    parts = arguments.parts or Path(config.output_dir) / "side-effects"
    jobs, missing = jobs_of(expand(config, inputs=study_inputs(config)), str(arguments.data), parts)
    devices = [name for name in arguments.devices.split(",") if name]
    cells, failures, used = [], [], set()
    left = {job.key: {key: job.argument[key] for key in FACTS} for job in jobs}
    slots = local_slots(min(arguments.workers, len(jobs)), devices)
    with contextlib.closing(run_jobs(jobs, measure, slots=slots, retries=1, seconds=JOB_SECONDS)) as ended:
        for job, outcome in ended:
            facts = left.pop(job.key)
            if outcome.value is None:
                failures.append({**facts, "error": str(outcome.error)})
            else:
                used.add(outcome.value.pop("device"))
                cells.append({**facts, **outcome.value})
            passed = time.monotonic() - started
            if not len(left) % 20:
                print(f"{len(cells)} measured, {len(failures)} failed, {len(left)} left, {passed:.0f} s", flush=True)
            if left and passed > arguments.seconds:
                break
    missing = [*missing, *left.values(), *({key: facts[key] for key in FACTS} for facts in failures)]
    cells.sort(key=lambda cell: (cell["model"], cell["arm"], cell["task"], cell["seed"]))
    whole = complete(cells, missing)
    write_json(
        arguments.out,
        {
            **record,
            "status": "provisional" if missing or record["environment"]["dirty"] else "done",
            "method": METHOD,
            # Parts may have been measured elsewhere.
            "devices": sorted(used),
            "cells": cells,
            "failures": failures,
            "missing": missing,
            "means": summarise(whole),
            "comparisons": compare(whole),
            "seconds": time.monotonic() - started,
        },
    )
    print(f"{len(cells)} measured, {len(failures)} failed, {len(missing)} missing: {arguments.out}")


if __name__ == "__main__":
    main()
