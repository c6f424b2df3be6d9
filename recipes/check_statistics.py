"""What the statistics of a study promise, measured on data whose truth is known.

Run from the repository root: python recipes/check_statistics.py [--out FILE] [--num N]

Coverage: how often the interval of 95 % holds the true difference, on seeds x examples with spreads between both, normal
and as right or wrong answers. False findings: how many families of comparisons without any difference show one, after
Holm's adjustment, against a baseline that all of a family share. Null: how often a placement drawn like the random ones is
found to differ from them. Power: how often the smallest detectable effect, as stated in advance, is found.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats

from ssmtune import crossed, stats
from ssmtune.records import new_record, write_json

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 1_000
BATCH = 250
"""Data sets drawn at once."""

NORMAL = tuple(
    {"seeds": seeds, "examples": 200, "sd_seed": sd_seed, "sd_example": sd_example, "sd_noise": 0.3}
    for seeds in (1, 2, 3, 5, 8)
    for sd_seed in ((0.0,) if seeds == 1 else (0.0, 0.01, 0.05))
    for sd_example in (0.0, 0.3)
)
"""Spreads as found between trained arms, and twice to ten times what they were there."""

BINARY = tuple(
    {"seeds": 5, "examples": 200, "logit": logit, "shift": shift, "sd_seed_logit": sd}
    for logit, shift in ((0.0, 0.0), (2.0, 0.5), (4.0, 1.0), (-4.0, 1.5))
    for sd in (0.05, 0.3)
)
"""Arms with log-odds `logit` and `logit + shift` on an example of middling difficulty; `sd_seed_logit` between seeds."""

SD_DIFFICULTY = 1.5
FAMILIES = tuple(
    {"comparisons": num, "seeds": seeds, "examples": 200, "logit": 1.0, "sd_seed_logit": sd}
    for num, seeds in ((3, 5), (8, 5), (24, 5), (8, 3))
    for sd in (0.05, 0.3)
)
NULLS = tuple(
    {"draws": draws, "seeds": 5, "examples": 200, "sd_draw": sd, "sd_seed": 0.02, "sd_example": 0.3, "sd_noise": 0.3}
    for draws in (3, 5)
    for sd in (0.0, 0.02, 0.1)
)
POWERS = tuple(
    {"seeds": 5, "examples": 400, "sd_seed": sd, "sd_example": 0.1, "sd_noise": 0.3, "comparisons": num}
    for sd in (0.0, 0.02)
    for num in (1, 8)
)


def normal_differences(generator: np.random.Generator, num: int, design: dict[str, Any]) -> Floats:
    """Paired differences `[num, seeds, examples]` with mean 0."""
    seeds, examples = design["seeds"], design["examples"]
    by_seed = design["sd_seed"] * generator.standard_normal((num, seeds, 1))
    by_example = design["sd_example"] * generator.standard_normal((num, 1, examples))
    return by_seed + by_example + design["sd_noise"] * generator.standard_normal((num, seeds, examples))


def answers(generator: np.random.Generator, logits_KAS: Floats, examples: int) -> Floats:
    """Right and wrong answers `[K, A, S, N]` of arms to the same examples, whose difficulties they share."""
    num, arms, seeds = logits_KAS.shape
    difficulty = SD_DIFFICULTY * generator.standard_normal((num, 1, 1, examples))
    right = generator.random((num, arms, seeds, examples)) < 1 / (1 + np.exp(difficulty - logits_KAS[..., None]))
    return right.astype(np.float64)


def share_right(logit: float, sd_seed_logit: float) -> float:
    """The share of right answers over all seeds and examples, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    at = logit + math.hypot(SD_DIFFICULTY, sd_seed_logit) * nodes
    return float((weights / (1 + np.exp(-at))).sum() / weights.sum())


def covers(d_KSN: Floats, truth: float) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Whether each interval holds the truth, and its width."""
    spreads = crossed.measure(d_KSN, num_resamples=NUM_RESAMPLES, seed=0)
    down, up = crossed.half_widths(spreads.sources, 1 - CONFIDENCE)
    return (spreads.mean - down <= truth) & (truth <= spreads.mean + up), down + up


def p_values(d_KSN: Floats) -> Floats:
    """The p-value of each of K paired differences."""
    spreads = crossed.measure(d_KSN, num_resamples=NUM_RESAMPLES, seed=0)
    return crossed.p_values(spreads.mean, spreads.sources)


def batches(num: int, draw: Callable[[int], Floats]) -> Floats:
    """`draw` in pieces of `BATCH`, put together."""
    sizes = [min(BATCH, num - start) for start in range(0, num, BATCH)]
    return np.concatenate([draw(size) for size in sizes])


def coverage(design: dict[str, Any], num: int) -> dict[str, Any]:
    """How often the interval holds the truth of a design, normal or of right and wrong answers."""
    generator = np.random.default_rng(0)
    widths: list[Floats] = []

    def draw(size: int) -> Floats:
        if "logit" in design:
            ahead = np.array([design["shift"], 0.0])[:, None] + design["logit"]
            logits = ahead + design["sd_seed_logit"] * generator.standard_normal((size, 2, design["seeds"]))
            scores = answers(generator, logits, design["examples"])
            ends = [share_right(design["logit"] + s, design["sd_seed_logit"]) for s in (design["shift"], 0.0)]
            held, width = covers(scores[:, 0] - scores[:, 1], ends[0] - ends[1])
        else:
            held, width = covers(normal_differences(generator, size, design), 0.0)
        widths.append(width)
        return held.astype(np.float64)

    held = batches(num, draw)
    return {**design, **share(held), "mean_width": float(np.concatenate(widths).mean())}


def false_families(design: dict[str, Any], num: int) -> dict[str, Any]:
    """Of families in which no arm differs from the baseline that all share: how many show a significant comparison."""
    generator = np.random.default_rng(1)

    def draw(size: int) -> Floats:
        shape = (size, design["comparisons"] + 1, design["seeds"])
        scores = answers(
            generator, design["logit"] + design["sd_seed_logit"] * generator.standard_normal(shape), design["examples"]
        )
        differences = scores[:, 1:] - scores[:, :1]
        p_KC = p_values(differences.reshape(-1, *differences.shape[2:])).reshape(size, -1)
        return np.array([float(min(stats.holm(list(p_C))) <= 0.05) for p_C in p_KC])

    return {**design, **share(batches(num, draw))}


def false_nulls(design: dict[str, Any], num: int) -> dict[str, Any]:
    """How often a placement that is drawn as the random ones are is found to differ from them."""
    generator = np.random.default_rng(2)

    def draw(size: int) -> Floats:
        shape = (size, design["draws"] + 1, design["seeds"], design["examples"])
        of_draw = design["sd_draw"] * generator.standard_normal((*shape[:2], 1, 1))
        of_seed = design["sd_seed"] * generator.standard_normal((*shape[:3], 1))
        shared = design["sd_example"] * generator.standard_normal((size, 1, 1, shape[3]))
        scores = of_draw + of_seed + shared + design["sd_noise"] * generator.standard_normal(shape)
        # As `stats.paired_difference` does for one placement against several.
        spreads = crossed.measure(scores[:, 0] - scores[:, 1:].mean(1), num_resamples=NUM_RESAMPLES, seed=0)
        draws = crossed.repeated("draws", scores[:, 1:].mean((2, 3)), is_new=True)
        return (crossed.p_values(spreads.mean, (*spreads.sources, draws)) <= 0.05).astype(np.float64)

    return {**design, **share(batches(num, draw))}


def power(design: dict[str, Any], num: int) -> dict[str, Any]:
    """How often the smallest detectable effect of a design, stated in advance for a power of 80 %, is found."""
    generator = np.random.default_rng(3)
    effect = stats.minimum_detectable_effect(
        num_seeds=design["seeds"],
        num_examples=design["examples"],
        num_comparisons=design["comparisons"],
        **{name: design[name] for name in ("sd_noise", "sd_example", "sd_seed")},
    )
    level = 0.05 / design["comparisons"]
    found = batches(
        num, lambda size: (p_values(effect + normal_differences(generator, size, design)) <= level).astype(np.float64)
    )
    return {**design, "effect": effect, **share(found)}


def share(hits: Floats) -> dict[str, Any]:
    """A share with its Wilson interval of 95 %."""
    interval = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return {"share": float(hits.mean()), "low": float(interval.low), "high": float(interval.high), "num": len(hits)}


def main() -> None:
    """Run every simulation and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("records/studies/statistics.json"))
    parser.add_argument("--num", type=int, default=4_000, help="data sets of each design")
    arguments = parser.parse_args()
    started = time.time()
    record = new_record(
        "synthetic", config={"num": arguments.num, "num_resamples": NUM_RESAMPLES, "method": stats.METHOD}
    )
    if record["environment"]["dirty"]:
        record["status"] = "provisional"
    tables: dict[str, tuple[Callable[[dict[str, Any], int], dict[str, Any]], tuple[dict[str, Any], ...]]] = {
        "normal": (coverage, NORMAL),
        "binary": (coverage, BINARY),
        "families": (false_families, FAMILIES),
        "nulls": (false_nulls, NULLS),
        "powers": (power, POWERS),
    }
    for name, (measure, designs) in tables.items():
        record[name] = [measure(design, arguments.num) for design in designs]
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    write_json(arguments.out, {**record, "seconds": time.time() - started})


if __name__ == "__main__":
    main()
