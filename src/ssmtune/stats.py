"""Statistics of studies: intervals, paired differences over seeds and examples, Holm, the smallest effect resolved.

Notation: a score array is `[S, N]`, S training seeds by N examples; both are samples of a larger population.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats

from ssmtune import crossed
from ssmtune.errors import DataError

Verdict = Literal["higher", "lower", "no difference"]
Floats = npt.NDArray[np.float64]

METHOD = (
    "paired by seed and example; Student's t over the seed means, and a studentised bootstrap over examples for what "
    "examples vary by beyond that, added in squares; data orders and draws of a placement each add their own t; "
    "p is the smallest level whose interval excludes zero"
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its interval; `low` and `high` are None when one value gives no interval."""

    mean: float
    low: float | None
    high: float | None
    num: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean paired difference a - b with interval and two-sided p; `per_seed` are the means of each seed.

    `sd_seed`, `sd_example` and `sd_noise` are its estimated spreads between seeds, between examples, and of the rest;
    `sd_order` and `sd_draw` those of the means of each data order and of each draw, 0 where there is one.
    `errors` are the standard error and the degrees of freedom of each source of variation. `is_null`: draws of a random
    placement were taken as what chance does, so that the interval holds their spread.
    """

    difference: float
    low: float
    high: float
    p: float
    standard_error: float
    errors: Mapping[str, tuple[float, float]]
    sd_seed: float
    sd_example: float
    sd_noise: float
    num_seeds: int
    num_examples: int
    per_seed: tuple[float, ...]
    num_orders: int = 1
    num_draws: int = 1
    sd_order: float = 0.0
    sd_draw: float = 0.0
    is_null: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One declared comparison of `arm` with `baseline`; `p_holm` is p adjusted over all comparisons of the study."""

    arm: str
    baseline: str
    task: str
    metric: str
    result: Difference
    p_holm: float | None = None
    alpha: float = 0.05
    family: str = ""
    model: str = ""
    trained_on: str = ""
    evaluated_on: str = ""
    margin: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return one flat mapping of plain JSON values, with the verdict and the sign consistency across seeds."""
        flat = dataclasses.asdict(self)
        result = flat.pop("result")
        result["per_seed"] = list(result["per_seed"])
        result["errors"] = {name: list(error) for name, error in result["errors"].items()}
        same, num = sign_consistency(self.result)
        return {
            **flat,
            **result,
            "seeds_same_sign": same,
            "seeds_compared": num,
            "no_larger_than": no_larger_than(self.result),
            "equivalent": None if self.margin is None else no_larger_than(self.result) < self.margin,
            "verdict": verdict(self),
        }


def mean_interval(values: Sequence[float] | Floats, *, confidence: float = 0.95) -> Interval:
    """Return the mean of `values` with its Student t interval.

    >>> mean_interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise DataError(f"mean_interval: got shape {array.shape}; expected a non-empty list of finite numbers.")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean=mean, low=None, high=None, num=1)
    half = float(scipy.stats.t.ppf(0.5 + confidence / 2, array.size - 1) * scipy.stats.sem(array))
    return Interval(mean=mean, low=mean - half, high=mean + half, num=int(array.size))


def clipped(interval: Interval, low: float = 0.0, high: float = 1.0) -> Interval:
    """Return `interval` cut to the values that are possible."""
    if interval.low is None or interval.high is None:
        return interval
    return dataclasses.replace(interval, low=max(low, interval.low), high=min(high, interval.high))


def wilson_interval(successes: int, num: int, *, confidence: float = 0.95) -> Interval:
    """Return the share `successes / num` with its Wilson score interval."""
    if num < 1 or not 0 <= successes <= num:
        raise DataError(f"wilson_interval: got {successes} of {num}; expected 0 <= successes <= num and num >= 1.")
    bounds = scipy.stats.binomtest(successes, num).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(mean=successes / num, low=float(bounds.low), high=float(bounds.high), num=num)


def example_interval(scores: Sequence[float] | Floats, *, confidence: float = 0.95) -> Interval:
    """Return the mean over examples with its interval: Wilson when every score is 0 or 1, else Student t."""
    array = np.asarray(scores, dtype=np.float64)
    if array.size and np.isin(array, (0.0, 1.0)).all():
        return wilson_interval(int(array.sum()), array.size, confidence=confidence)
    return mean_interval(array, confidence=confidence)


def paired_difference(
    a_SN: npt.ArrayLike,
    b_SN: npt.ArrayLike,
    *,
    seed: int,
    num_resamples: int = 2_000,
    confidence: float = 0.95,
    is_null: bool = False,
) -> Difference:
    """Return the mean of a - b over seeds and examples, with interval and p by `METHOD`.

    `a_SN` and `b_SN` are `[seeds, examples]` with the same example in the same column; one row (an untrained base) is used
    for every seed of the other. With one seed the interval speaks about examples only. Further axes go in front:
    `[orders, seeds, examples]`, `[draws, orders, seeds, examples]`; orders are paired as seeds are, draws are not.
    `is_null` asks whether the side with one draw lies outside of what the other's draws do.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (a_SN, b_SN)]
    shapes = [side.shape for side in sides]
    # [draws, orders, seeds, examples]
    a, b = (side.reshape((1,) * (4 - side.ndim) + side.shape) if side.ndim <= 4 else side for side in sides)
    paired = all(m == n or 1 in (m, n) for m, n in zip(a.shape[1:3], b.shape[1:3], strict=True))
    if a.ndim != 4 or b.ndim != 4 or a.shape[3] != b.shape[3] or not paired or 0 in (a.size, b.size):
        raise DataError(
            f"paired_difference: got shapes {shapes[0]} and {shapes[1]}; expected [seeds, examples] with equal sizes."
        )
    if a.shape[3] < 2:
        raise DataError(f"paired_difference: got {a.shape[3]} example(s); expected at least 2 to form an interval.")
    d_OSN = a.mean(0) - b.mean(0)
    if not np.isfinite(d_OSN).all():
        raise DataError(
            "paired_difference: scores hold NaN or infinity; expected finite numbers. Evaluate the arm again."
        )
    if is_null and sorted((len(a) > 1, len(b) > 1)) != [False, True]:
        raise DataError(
            f"paired_difference: got {len(a)} and {len(b)} draws; a null needs two or more on one side alone."
        )
    d_SN = d_OSN.mean(0)
    spreads = crossed.measure(d_SN[None], num_resamples=num_resamples, seed=seed)
    orders, draws = d_OSN.mean((1, 2)), [side.mean((1, 2, 3)) for side in (a, b)]
    further = [crossed.repeated("orders", orders[None])] if len(orders) > 1 else []
    further += [crossed.repeated("draws", means[None], is_new=is_null) for means in draws if len(means) > 1]
    sources = (*spreads.sources, *further)
    down, up = crossed.half_widths(sources, 1 - confidence)
    mean = float(spreads.mean[0])
    return Difference(
        difference=mean,
        low=mean - float(down[0]),
        high=mean + float(up[0]),
        p=float(crossed.p_values(spreads.mean, sources)[0]),
        standard_error=math.sqrt(sum(float(source.variance[0]) for source in sources)),
        errors={source.name: (math.sqrt(float(source.variance[0])), source.dof) for source in sources},
        sd_seed=float(spreads.seed[0]),
        sd_example=float(spreads.example[0]),
        sd_noise=float(spreads.rest[0]),
        num_seeds=len(d_SN),
        num_examples=d_SN.shape[1],
        per_seed=tuple(float(v) for v in d_SN.mean(axis=1)),
        num_orders=len(orders),
        num_draws=max(map(len, draws)),
        sd_order=float(orders.std(ddof=1)) if len(orders) > 1 else 0.0,
        sd_draw=max((float(means.std(ddof=1)) for means in draws if len(means) > 1), default=0.0),
        is_null=is_null,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given (scipy has only false-discovery control).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def minimum_detectable_effect(
    *,
    num_seeds: int,
    num_examples: int,
    sd_noise: float,
    sd_example: float = 0.0,
    sd_seed: float = 0.0,
    num_comparisons: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """Return the true paired difference that is found with probability `power` (Bonferroni over `num_comparisons`).

    The spreads are those of `Difference`, each with the quantiles that its interval will have: Student's with
    `num_seeds - 1` dof for seeds and noise, Student's over examples for the rest, and for everything with one seed.
    """
    noise = sd_noise**2 / (num_seeds * num_examples)
    by_example = sd_example**2 / num_examples + (noise if num_seeds == 1 else 0)
    errors = {"examples": (math.sqrt(by_example), num_examples - 1)}
    if num_seeds > 1:
        errors["seeds"] = (math.sqrt(sd_seed**2 / num_seeds + noise), num_seeds - 1)
    return _found_with(errors, alpha / num_comparisons, power)


def _found_with(errors: Mapping[str, tuple[float, float]], alpha: float, power: float) -> float:
    """Return the effect found at level `alpha` with probability `power`, from each source's standard error and dof.

    The noncentral t of one source; for several, at the half width that `crossed.half_widths` gives them and with
    Satterthwaite's degrees of freedom.
    """
    found = [(error**2, dof) for error, dof in errors.values() if error > 0]
    total = sum(variance for variance, _ in found)
    if total == 0:
        return 0.0
    dof = total**2 / sum(variance**2 / dof for variance, dof in found)
    half = math.sqrt(sum(float(scipy.stats.t.isf(alpha / 2, dof)) ** 2 * variance for variance, dof in found))
    at = half / math.sqrt(total)

    def missing(centre: float) -> float:
        return float(scipy.stats.nct.sf(at, dof, centre)) - power

    return float(scipy.optimize.brentq(missing, 0.0, 3 * at + 10)) * math.sqrt(total)


def resolvable_effect(result: Difference, *, num_comparisons: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that a repetition would find with probability `power`, from the measured standard errors."""
    return _found_with(result.errors, alpha / num_comparisons, power)


def sign_consistency(result: Difference) -> tuple[int, int]:
    """Return how many seeds have a difference of the sign of the mean, and how many seeds there are."""
    sign = np.sign(result.difference)
    same = sum(1 for value in result.per_seed if np.sign(value) == sign) if sign else 0
    return same, len(result.per_seed)


def no_larger_than(result: Difference) -> float:
    """Return the size that the true difference does not exceed, either way, as far as the interval says.

    Below a margin declared in advance the arms are equivalent: both one-sided tests reject at half of 1 - confidence
    (Schuirmann 1987), stricter than the usual pair at 1 - confidence.
    """
    return max(abs(result.low), abs(result.high))


def verdict(comparison: Comparison) -> Verdict:
    """Return "higher" or "lower" only when the interval excludes zero and p (Holm's if adjusted) is at most alpha."""
    result = comparison.result
    inside = result.low <= 0 <= result.high
    adjusted = comparison.p_holm if comparison.p_holm is not None else result.p
    if inside or adjusted > comparison.alpha:
        return "no difference"
    return "higher" if result.difference > 0 else "lower"
