"""The claims of five published works, each judged by the interval of the comparison that our record holds for it.

A claim names its evidence; what follows from it is computed here and typed nowhere:
"replicated" when every comparison says what the claim says, "replicated in N of M" when some do and none says the
opposite,
"not replicated" otherwise, with how many say what.
A comparison says "higher" or "lower" only when its interval excludes zero and its adjusted p is at most 0.05;
it says "equal" when its whole interval lies within the margin.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ssmtune.records import read_record
from ssmtune.stats import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "records/studies"
GRANITE = STUDIES / "granite/study.json.gz"
S4_REGRESSION = STUDIES / "s4-regression.json.gz"
TRACKING = STUDIES / "state-tracking.json.gz"
PLACEMENT = STUDIES / "placement/study.json.gz"
METHODS = STUDIES / "methods/study.json.gz"
SIDE_EFFECTS = STUDIES / "side-effects.json.gz"

MARGIN = 0.05
"""A difference in a share of right answers that would not matter; chosen before the studies ran."""
MARGIN_BITS = 0.01
"""A difference in held-out bits per byte that would not matter; chosen before side effects were measured."""
UNCHANGED = 0.01
"""Tensors of which fewer elements than this share moved were left alone."""

Says = Literal["higher", "lower", "equal", "no higher"]
NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What the evidence says: the verdict, the figures behind it, and the record; None where nothing was run."""

    verdict: str
    figures: str = ""
    record: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a work states, in our words, with its own figures, and how it is judged."""

    statement: str
    published: str
    judge: Callable[[], Finding]


def says(row: Mapping[str, Any], expected: Says, margin: float) -> bool:
    """Whether one comparison says what is expected, by its interval and its adjusted p.

    Two arms that score the same on every example and seed have learned nothing, or all there is: that says nothing.
    """
    if expected == "equal":
        return bool(row["standard_error"] > 0 and max(abs(row["low"]), abs(row["high"])) < margin)
    if expected == "no higher":
        return bool(direction(row) != "higher")
    return direction(row) == expected


def direction(row: Mapping[str, Any]) -> str:
    """Return "higher", "lower" or "no difference": an interval that excludes zero and an adjusted p of at most alpha."""
    p = row["p"] if row["p_holm"] is None else row["p_holm"]
    if row["low"] <= 0 <= row["high"] or p > row["alpha"]:
        return "no difference"
    return "higher" if row["low"] > 0 else "lower"


def contradicts(row: Mapping[str, Any], expected: Says, margin: float) -> bool:
    """Whether one comparison says the opposite of what is expected; for "equal", that it is resolved beyond the margin."""
    if expected == "equal":
        return bool(row["low"] > margin or row["high"] < -margin)
    opposite = {"higher": "lower", "lower": "higher", "no higher": "higher"}
    return direction(row) == opposite[expected]


def verdict(rows: Sequence[Mapping[str, Any]], expected: Says, margin: float = MARGIN) -> str:
    """Return what follows for the claim from its comparisons; no comparison at all means that it was not run."""
    if not rows:
        return NOT_RUN
    num = sum(says(row, expected, margin) for row in rows)
    opposite = sum(contradicts(row, expected, margin) for row in rows)
    if num == len(rows):
        return "replicated"
    if num and opposite:
        return f"not replicated: so in {num} of {len(rows)}, the opposite in {opposite}"
    if num:
        return f"replicated in {num} of {len(rows)}"
    if not opposite:
        return "not replicated: nothing resolved"
    return f"not replicated: the opposite in {opposite} of {len(rows)}"


def figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """The difference with its interval of each comparison, or the extreme ones of many."""
    ordered = sorted(rows, key=lambda row: row["difference"])
    shown = list(rows) if len(rows) <= 4 else [ordered[0], ordered[-1]]
    parts = [f"{label(row)}: {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" for row in shown]
    lead = "" if len(rows) <= 4 else f"{len(rows)} comparisons, from "
    return lead + ("; " if len(rows) <= 4 else " to ").join(parts)


def label(row: Mapping[str, Any]) -> str:
    """What a comparison was made on."""
    return str(row["task"]).replace("study_tasks:", "")


def compared(
    path: Path,
    pair: tuple[str, str],
    expected: Says,
    *,
    tasks: Sequence[str] = (),
    where: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    margin: float = MARGIN,
) -> Callable[[], Finding]:
    """Judge by the comparisons of a pair of arms in a record, on `tasks` (all when empty) and where `where` holds."""

    def judge() -> Finding:
        record = stored(path)
        if record is None:
            return Finding(verdict=NOT_RUN)
        rows = [
            row
            for row in record["comparisons"]
            if (row["arm"], row["baseline"]) == pair and (not tasks or row["task"] in tasks) and where(row)
        ]
        return Finding(verdict=verdict(rows, expected, margin), figures=figures(rows), record=path if rows else None)

    return judge


@lru_cache
def stored(path: Path) -> dict[str, Any] | None:
    """The record, or None where it does not exist (yet)."""
    return read_record(path) if path.exists() else None


def beyond_scale(reason: str) -> Callable[[], Finding]:
    """A claim about what models of this size, or our data, cannot show."""
    return lambda: Finding(verdict="not testable at this scale", figures=reason)


def topology(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Comparisons of the models of one topology, on what was trained on."""
    return lambda row: row["model"].endswith(name) and row["trained_on"] == row["evaluated_on"]


def harm(arrangement: str) -> Callable[[], Finding]:
    """Judge whether recurrent adapters harm the models of one topology, on every test that their base passes at all.

    Nothing can be lost where the untrained base is at the floor, so a test counts where its score is above `MARGIN`.
    """

    def judge() -> Finding:
        record = stored(PLACEMENT)
        if record is None:
            return Finding(verdict=NOT_RUN)
        reached = {}
        for panel in record["tasks"]:
            for arm in panel["arms"]:
                if arm["name"] == "base":
                    place = (panel["model"], panel["trained_on"], panel["evaluated_on"])
                    reached[place] = arm["metrics"][panel["primary"]]["mean"]
        rows = [
            row
            for row in record["comparisons"]
            if (row["arm"], row["baseline"]) == ("recurrent", "base") and row["model"].endswith(arrangement)
        ]
        able = [row for row in rows if reached[_place(row)] > MARGIN]
        if not rows:
            return Finding(verdict=NOT_RUN)
        if able:
            beside = {
                _place(row): direction(row)
                for row in record["comparisons"]
                if (row["arm"], row["baseline"]) == ("attention", "base")
            }
            # Training costs other tasks wherever the adapters are: the claim is about this place.
            also = sum(beside.get(_place(row)) == "lower" for row in able)
            shown = f"{figures(able)}; LoRA on attention is below the base as well in {also} of {len(able)}"
            return Finding(verdict=verdict(able, "lower"), figures=shown, record=PLACEMENT)
        return Finding(
            verdict="not testable here: the untrained models are at the floor", figures=figures(rows), record=PLACEMENT
        )

    return judge


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["trained_on"], row["evaluated_on"]


def topology_contrast() -> Finding:
    """Transfer of recurrent adapters: sequential less parallel, for the same recurrence, trained task and test."""
    record = stored(PLACEMENT)
    if record is None:
        return Finding(verdict=NOT_RUN)
    effects = {
        (row["model"], row["trained_on"], row["evaluated_on"]): row
        for row in record["comparisons"]
        if (row["arm"], row["baseline"]) == ("recurrent", "base") and row["trained_on"] != row["evaluated_on"]
    }
    rows = []
    for (model, trained_on, evaluated_on), one in effects.items():
        recurrence, _, arrangement = model.partition(".")
        other = effects.get((f"{recurrence}.parallel", trained_on, evaluated_on))
        if arrangement == "sequential" and other is not None:
            rows.append(contrast(one, other, f"{recurrence}: {trained_on} -> {evaluated_on}"))
    # Bonferroni, since each contrast has a level of its own.
    rows = [{**row, "p_holm": min(1.0, row["p"] * len(rows))} for row in rows]
    num = sum(direction(row) != "no difference" for row in rows)
    words = "replicated" if num == len(rows) else f"replicated in {num} of {len(rows)}"
    return Finding(
        verdict=(words if num else "not replicated: nothing resolved") if rows else NOT_RUN,
        figures=figures(rows),
        record=PLACEMENT if rows else None,
    )


def contrast(one: Mapping[str, Any], other: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Difference of two independent differences, by their standard errors and the normal distribution."""
    error = math.hypot(one["standard_error"], other["standard_error"])
    difference = one["difference"] - other["difference"]
    p = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(difference == 0)
    reach = 1.959963984540054 * error
    return {
        "task": task,
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "p": p,
        "p_holm": None,
        "alpha": 0.05,
    }


def dt_bias_unchanged() -> Finding:
    """Share of the elements of `dt_bias` that training moved where it was trained in fp32, with its interval."""
    moved = num = 0
    for path in sorted((GRANITE.parent / "cells").glob("V4-*.json.gz")):
        for entry in (read_record(path).get("train") or {}).get("core") or []:
            if entry["tensor"].endswith("dt_bias"):
                moved += round(entry["moved"] * entry["num"])
                num += entry["num"]
    if not num:
        return Finding(verdict=NOT_RUN)
    interval = wilson_interval(moved, num)
    assert interval.low is not None and interval.high is not None
    return Finding(
        verdict="replicated" if interval.high < UNCHANGED else "not replicated: it moves where it is trained in fp32",
        figures=f"{moved:,} of {num:,} elements moved: {interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]",
        record=GRANITE,
    )


def either(*judges: Callable[[], Finding]) -> Callable[[], Finding]:
    """Judge by the first of several sources that was run."""

    def judge() -> Finding:
        found = [one() for one in judges]
        return next((finding for finding in found if finding.verdict != NOT_RUN), found[0])

    return judge


DFA = tuple(f"dfa {length}" for length in (64, 128, 256, 512))
PARITY = tuple(f"parity {length}" for length in (64, 128, 256, 512))
TEXT = ("text 128", "text 512")

WORKS: dict[str, tuple[Claim, ...]] = {
    "Co-training the state-space core on Granite (Ford 2026)": (
        Claim(
            statement="Target names of transformer recipes (V1) tune next to nothing on a hybrid",
            published="exact 0.1 % against 0.0 % of the base",
            judge=compared(GRANITE, ("V1", "base"), "no higher"),
        ),
        Claim(
            statement="LoRA on every projection (V2) is far above those names (V1)",
            published="exact 40.8 % against 0.1 %",
            judge=compared(GRANITE, ("V2", "V1"), "higher"),
        ),
        Claim(
            statement="Training the core beside LoRA helps even when the core is then lost (V3 over V2)",
            published="exact 52.2 % against 40.8 %",
            judge=compared(GRANITE, ("V3", "V2"), "higher"),
        ),
        Claim(
            statement="Keeping the trained core helps further (V4 over V3)",
            published="exact 55.8 % against 52.2 %",
            judge=compared(GRANITE, ("V4", "V3"), "higher"),
        ),
        Claim(
            statement="Training leaves `dt_bias` unchanged",
            published="0 % of its elements changed",
            judge=dt_bias_unchanged,
        ),
    ),
    "Sparse dimension tuning (Galim et al. 2025)": (
        Claim(
            statement="SDT with LoRA beats LoRA at an equal budget when S4 models are to be matched",
            published="lower error in every setting shown",
            judge=compared(S4_REGRESSION, ("sdt", "lora"), "lower"),
        ),
        Claim(
            statement="The choice of channels and states by a warm-up matters (against the same number at random)",
            published="implied; no control is shown",
            judge=compared(S4_REGRESSION, ("sdt", "sdt-random"), "lower"),
        ),
        Claim(
            statement="SDT with LoRA beats LoRA at an equal budget on language tasks",
            published="small gains on GLUE and others",
            judge=compared(METHODS, ("sdt", "lora"), "higher"),
        ),
        Claim(
            statement="The same control on language tasks",
            published="implied; no control is shown",
            judge=compared(METHODS, ("sdt", "sdt.random"), "higher"),
        ),
        Claim(
            statement="Learned positions and states fall short of LoRA",
            published="tables of a benchmark",
            judge=compared(METHODS, ("affix", "lora"), "lower"),
        ),
        Claim(
            statement="DoRA is no worse than LoRA",
            published="tables of a benchmark",
            judge=compared(METHODS, ("dora", "lora"), "equal"),
        ),
    ),
    "Where LoRA goes in hybrids (Borobia et al. 2026)": (
        Claim(
            statement="Adapting the recurrent layers harms a sequential hybrid (withdrawn by its authors)",
            published="-14.8 points, rescored +1.6 [-7.8, 10.9]",
            judge=harm("sequential"),
        ),
        Claim(
            statement="Adapting the recurrent layers helps a parallel hybrid (withdrawn by its authors)",
            published="+8.6 points, rescored +2.0 [-4.3, 8.2]",
            judge=compared(PLACEMENT, ("recurrent", "base"), "higher", where=topology("parallel")),
        ),
        Claim(
            statement="Attention alone matches all layers",
            published="39.8 % against 37.5 %, rescored -9.4 [-17.2, -1.6]",
            judge=compared(PLACEMENT, ("attention", "all"), "equal"),
        ),
        Claim(
            statement="What recurrent adapters do to other tasks depends on the topology",
            published="signs differ between two models",
            judge=topology_contrast,
        ),
        Claim(
            statement="Corrected version: recurrent layers and attention differ by at most five points",
            published="no difference of components resolved",
            judge=compared(
                PLACEMENT, ("recurrent", "attention"), "equal", where=lambda row: row["family"] == "placement"
            ),
        ),
        Claim(
            statement="Pre-registered, without results: the recurrent layers beat places drawn at random",
            published="-",
            judge=compared(PLACEMENT, ("recurrent", "random"), "higher"),
        ),
    ),
    "Hankel reduced-order adapter (Thapliyal 2026)": (
        Claim(
            statement="The adapter tracks a finite automaton over lengths at which LoRA fails",
            published="accuracy 0.843 against 0.291 at 512",
            judge=compared(TRACKING, ("hankel", "lora"), "higher", tasks=DFA),
        ),
        Claim(
            statement="A model trained with it from the start tracks the automaton better than one without",
            published="0.843 at 512 (trained from scratch)",
            judge=compared(TRACKING, ("scratch+hankel", "scratch"), "higher", tasks=DFA),
        ),
        Claim(
            statement="Balanced truncation costs next to nothing",
            published="0.843 to 0.840 at 512",
            judge=compared(TRACKING, ("hankel-truncated", "hankel"), "equal", tasks=DFA),
        ),
        Claim(
            statement="It improves parity",
            published="mentioned, no table",
            judge=compared(TRACKING, ("hankel", "lora"), "higher", tasks=PARITY),
        ),
        Claim(
            statement="Text costs fewer bits with it, in every setting",
            published="18 of 18 settings (trained from scratch)",
            judge=compared(TRACKING, ("scratch+hankel", "scratch"), "lower", tasks=TEXT),
        ),
        Claim(
            statement="It beats LoRA of an equal budget on tasks",
            published="QuALITY 0.474 against 0.352 (whose baselines were very probably evaluated untrained)",
            judge=compared(METHODS, ("hankel", "lora"), "higher"),
        ),
        Claim(
            statement="Its memory is what helps (against the same branch without memory)",
            published="implied; no control is shown",
            judge=compared(METHODS, ("hankel", "static.adapter"), "higher"),
        ),
        Claim(
            statement="It reads documents of 2,048 tokens and more better than LoRA does",
            published="QMSum ROUGE-1 0.253 against 0.148",
            judge=beyond_scale("a 7 B model and meeting transcripts; models of 6 M parameters answer neither"),
        ),
    ),
    "Initial states, S0 (Young 2026)": (
        Claim(
            statement="Trained initial states beat LoRA on attention at an equal budget",
            published="HumanEval 72.2 against 61.5",
            judge=compared(METHODS, ("initial.state", "lora.attention"), "higher"),
        ),
        Claim(
            statement="They tie with LoRA on more than attention (Falcon-H1)",
            published="71.8 against 71.4",
            judge=compared(METHODS, ("initial.state", "lora"), "equal"),
        ),
        Claim(
            statement="An offset at every step is above an initial state",
            published="+27.1 against +23.5",
            judge=compared(METHODS, ("state.offset.h", "initial.state"), "higher"),
        ),
        Claim(
            statement="They leave the rest of the model as it was",
            published="influence of 0.03 % at the prompt's end",
            judge=compared(
                SIDE_EFFECTS,
                ("initial.state", "base"),
                "equal",
                where=lambda row: row["metric"] == "bits_per_byte",
                margin=MARGIN_BITS,
            ),
        ),
        Claim(
            statement="The gain grows with the size of the model",
            published="+2.6 at 0.8 B to +44.0 at 9 B",
            judge=beyond_scale("needs models of several sizes that solve the task at all"),
        ),
    ),
}


def claims_markdown() -> str:
    """One table for each work: claim, what it published, what our record says, the figures behind that, and the record."""
    parts = []
    for work, claims in WORKS.items():
        lines = ["| claim | published | here | figures | record |", "| --- | --- | --- | --- | --- |"]
        for claim in claims:
            found = claim.judge()
            link = "-"
            if found.record is not None:
                place = found.record.relative_to(ROOT)
                link = f"[{place.parent.name if place.name.startswith('study.') else place.name.split('.')[0]}](../{place})"
            cells = (claim.statement, claim.published, f"**{found.verdict}**", found.figures or "-", link)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"### {work}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)
