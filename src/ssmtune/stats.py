"""Statistics of studies: intervals, paired differences over seeds and examples, Holm, the smallest effect resolved.

Notation: a score array is `[S, N]`, S training seeds by N examples; both are samples of a larger population.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.stats

from ssmtune.errors import DataError

Verdict = Literal["higher", "lower", "no difference"]
Floats = npt.NDArray[np.float64]

METHOD = (
    "two-level paired bootstrap (seeds and examples resampled together); percentile interval whose width is calibrated "
    "to the crossed random-effects variance with Student t (Satterthwaite degrees of freedom); "
    "p is the smallest level whose interval excludes zero"
)
BLOCK_ELEMENTS = 4_000_000
"""Bootstrap weights held at once: 32 MB, so that memory does not grow with the number of resamples."""


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

    `sd_seed`, `sd_example` and `sd_noise` are its estimated spreads between seeds, between examples, and of the rest.
    """

    difference: float
    low: float
    high: float
    p: float
    standard_error: float
    dof: float
    sd_seed: float
    sd_example: float
    sd_noise: float
    num_seeds: int
    num_examples: int
    per_seed: tuple[float, ...]


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
        same, num = sign_consistency(self.result)
        return {**flat, **result, "seeds_same_sign": same, "seeds_compared": num, "verdict": verdict(self)}


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
    a_SN: npt.ArrayLike, b_SN: npt.ArrayLike, *, num_resamples: int = 10_000, seed: int, confidence: float = 0.95
) -> Difference:
    """Return the mean of a - b over seeds and examples, with interval and p by `METHOD`.

    `a_SN` and `b_SN` are `[seeds, examples]` with the same example in the same column; one row (an untrained
    base) is used for every seed of the other. With one seed the interval speaks about examples only.
    """
    a, b = np.atleast_2d(np.asarray(a_SN, dtype=np.float64)), np.atleast_2d(np.asarray(b_SN, dtype=np.float64))
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[1] != b.shape[1]
        or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0]))
    ):
        raise DataError(
            f"paired_difference: got shapes {a.shape} and {b.shape}; expected [seeds, examples] with equal sizes."
        )
    if a.shape[1] < 2:
        raise DataError(f"paired_difference: got {a.shape[1]} example(s); expected at least 2 to form an interval.")
    d_SN = a - b
    if not np.isfinite(d_SN).all():
        raise DataError(
            "paired_difference: scores hold NaN or infinity; expected finite numbers. Evaluate the arm again."
        )
    mean = float(d_SN.mean())
    sd_seed, sd_example, sd_noise, error, dof = _crossed_variance(d_SN)
    deviations = np.sort(_bootstrap_means(d_SN, num_resamples, seed) - mean)
    spread = float(deviations.std())
    calibrated = deviations * (error / spread) if spread > 0 else np.zeros_like(deviations)
    low, high = _bounds(mean, calibrated, dof, 1 - confidence)
    return Difference(
        difference=mean,
        low=low,
        high=high,
        p=_p_value(mean, calibrated, dof),
        standard_error=error,
        dof=dof,
        sd_seed=sd_seed,
        sd_example=sd_example,
        sd_noise=sd_noise,
        num_seeds=d_SN.shape[0],
        num_examples=d_SN.shape[1],
        per_seed=tuple(float(v) for v in d_SN.mean(axis=1)),
    )


def _crossed_variance(d_SN: Floats) -> tuple[float, float, float, float, float]:
    """Return sd between seeds, between examples, of the rest, the mean's standard error, and its Satterthwaite dof.

    Crossed random effects without replication: a negative variance component counts as zero.
    """
    num_seeds, num_examples = d_SN.shape
    size = d_SN.size
    if num_seeds == 1:
        sd = float(d_SN.std(ddof=1))
        return 0.0, sd, 0.0, sd / math.sqrt(num_examples), float(num_examples - 1)
    rows, columns = d_SN.mean(axis=1, keepdims=True), d_SN.mean(axis=0, keepdims=True)
    ms_seed = num_examples * float(rows.var(ddof=1))
    ms_example = num_seeds * float(columns.var(ddof=1))
    dof_rest = (num_seeds - 1) * (num_examples - 1)
    ms_rest = float(((d_SN - rows - columns + d_SN.mean()) ** 2).sum()) / dof_rest
    between_seeds, between_examples = max(ms_seed - ms_rest, 0.0), max(ms_example - ms_rest, 0.0)
    total = between_seeds + between_examples + ms_rest
    if total == 0:
        return 0.0, 0.0, 0.0, 0.0, float(num_examples - 1)
    weights = ms_seed**2 / (num_seeds - 1) + ms_example**2 / (num_examples - 1) + ms_rest**2 / dof_rest
    # The dof of a difference of mean squares can fall below that of its smallest term; it cannot in truth.
    dof = max(total**2 / weights, float(num_seeds - 1))
    return (
        math.sqrt(between_seeds / num_examples),
        math.sqrt(between_examples / num_seeds),
        math.sqrt(ms_rest),
        math.sqrt(total / size),
        dof,
    )


def _bootstrap_means(d_SN: Floats, num_resamples: int, seed: int) -> Floats:
    """Return means over resampled seeds and examples: multinomial weights times `d_SN`, in blocks."""
    num_seeds, num_examples = d_SN.shape
    generator = np.random.default_rng(seed)
    block = max(1, min(num_resamples, BLOCK_ELEMENTS // num_examples))
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        weights_BN = _counts(generator, size, num_examples)
        weights_BS = _counts(generator, size, num_seeds)
        means[start : start + size] = ((weights_BN @ d_SN.T) * weights_BS).sum(axis=1)
    scaled: Floats = means / (num_seeds * num_examples)
    return scaled


def _counts(generator: np.random.Generator, size: int, num: int) -> Floats:
    """Return `[size, num]` counts of `num` draws with replacement; faster than multinomial draws."""
    draws = generator.integers(0, num, size=(size, num)) + num * np.arange(size)[:, None]
    counts: Floats = np.bincount(draws.ravel(), minlength=size * num).astype(np.float64)
    return counts.reshape(size, num)


def _bounds(mean: float, deviations: Floats, dof: float, alpha: float) -> tuple[float, float]:
    widen = float(scipy.stats.t.ppf(1 - alpha / 2, dof) / scipy.stats.norm.ppf(1 - alpha / 2))
    low, high = np.quantile(deviations, (alpha / 2, 1 - alpha / 2))
    return mean + widen * float(low), mean + widen * float(high)


def _p_value(mean: float, deviations: Floats, dof: float) -> float:
    """Return the smallest level whose interval excludes zero; never below 2 / (resamples + 1)."""
    if not deviations.any():
        return 1.0 if mean == 0 else 2.0 / (deviations.size + 1)

    def margin(alpha: float) -> float:
        low, high = _bounds(mean, deviations, dof, alpha)
        return low if mean > 0 else -high

    smallest, largest = 2.0 / (deviations.size + 1), 1.0 - 1e-9
    if margin(smallest) > 0:
        return smallest
    if margin(largest) <= 0:
        return 1.0
    return float(scipy.optimize.brentq(margin, smallest, largest, xtol=1e-9))


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

    The spreads are those of `Difference`. With a spread between seeds, quantiles are t with `num_seeds - 1` dof.
    """
    variance = sd_seed**2 / num_seeds + sd_example**2 / num_examples + sd_noise**2 / (num_seeds * num_examples)
    quantiles = scipy.stats.norm if sd_seed == 0 or num_seeds < 2 else scipy.stats.t(num_seeds - 1)
    return float((quantiles.ppf(1 - alpha / (2 * num_comparisons)) + quantiles.ppf(power)) * math.sqrt(variance))


def resolvable_effect(result: Difference, *, num_comparisons: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that a repetition would find with probability `power`, from the measured standard error."""
    t = scipy.stats.t(result.dof)
    return float((t.ppf(1 - alpha / (2 * num_comparisons)) + t.ppf(power)) * result.standard_error)


def sign_consistency(result: Difference) -> tuple[int, int]:
    """Return how many seeds have a difference of the sign of the mean, and how many seeds there are."""
    sign = np.sign(result.difference)
    same = sum(1 for value in result.per_seed if np.sign(value) == sign) if sign else 0
    return same, len(result.per_seed)


def verdict(comparison: Comparison) -> Verdict:
    """Return "higher" or "lower" only when the interval excludes zero and p (Holm's if adjusted) is at most alpha."""
    result = comparison.result
    inside = result.low <= 0 <= result.high
    adjusted = comparison.p_holm if comparison.p_holm is not None else result.p
    if inside or adjusted > comparison.alpha:
        return "no difference"
    return "higher" if result.difference > 0 else "lower"
