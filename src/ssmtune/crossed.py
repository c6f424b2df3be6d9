"""Intervals and p-values of mean differences whose scores vary between seeds and between examples, many at once.

Notation: `K` data sets, each `[S, N]`, S training seeds by N examples; `alpha` is 1 - confidence. Derivation and the
simulations that chose this method among others: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

Floats = npt.NDArray[np.float64]

SMALLEST_P = 1e-12
"""Further out than any tail is known."""

REFERENCE_ALPHA = 0.05
"""Where the bootstrap's quantiles are compared with Student's; further out it has too few resamples to say anything."""

LOPSIDED = 3.0
"""At most this much longer, and no more than this much shorter, is one side of an interval than Student's."""

BLOCK_ELEMENTS = 2_000_000
"""Bootstrap weights held at once: 16 MB, so that memory does not grow with the number of resamples."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one source of variation contributes to the mean: its variance `[K]`, and the dof it is known with.

    `down` and `up` `[K]` stretch Student's quantile below and above the mean.
    """

    name: str
    variance: Floats
    dof: float
    down: Floats | float = 1.0
    up: Floats | float = 1.0


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """Mean `[K]` with its sources of variation, and the standard deviations between seeds, between examples, of the rest."""

    mean: Floats
    sources: tuple[Source, ...]
    seed: Floats
    example: Floats
    rest: Floats


def measure(d_KSN: Floats, *, num_resamples: int, seed: int) -> Spreads:
    """Return the spreads of K data sets. With S = 1 the examples are the only source that can be seen.

    Seeds: the variance of the seed means, with S - 1 dof; it holds their share of the noise. Examples: what their means
    vary by beyond the noise (crossed random effects without replication), asymmetric as a studentised bootstrap of the
    example means is.
    """
    _, num_seeds, num_examples = d_KSN.shape
    size = num_seeds * num_examples
    mean, rows_KS, columns_KN = d_KSN.mean((1, 2)), d_KSN.mean(2), d_KSN.mean(1)
    ms_example = num_seeds * columns_KN.var(1, ddof=1)
    sources: list[Source] = []
    if num_seeds > 1:
        ms_seed = num_examples * rows_KS.var(1, ddof=1)
        rest_KSN = d_KSN - rows_KS[:, :, None] - columns_KN[:, None] + mean[:, None, None]
        ms_rest = (rest_KSN**2).sum((1, 2)) / ((num_seeds - 1) * (num_examples - 1))
        sources.append(Source(name="seeds", variance=ms_seed / size, dof=num_seeds - 1))
    else:
        ms_seed = ms_rest = np.zeros_like(mean)
    own_example = np.maximum(ms_example - ms_rest, 0.0)
    down, up = _lopsidedness(columns_KN, num_resamples, seed)
    sources.append(Source(name="examples", variance=own_example / size, dof=num_examples - 1, down=down, up=up))
    return Spreads(
        mean=mean,
        sources=tuple(sources),
        seed=np.sqrt(np.maximum(ms_seed - ms_rest, 0.0) / num_examples),
        example=np.sqrt(own_example / num_seeds),
        rest=np.sqrt(ms_rest),
    )


def repeated(name: str, means_KL: Floats, *, is_new: bool = False) -> Source:
    """Return what a further axis of L levels contributes, from the mean at each level.

    `is_new`: the comparison is with one level more, drawn like these, and not with their mean.
    """
    num = means_KL.shape[1]
    variance = means_KL.var(1, ddof=1) * (1 / num + (1 if is_new else 0))
    return Source(name=name, variance=variance, dof=num - 1)


def half_widths(sources: Sequence[Source], alpha: Floats | float) -> tuple[Floats, Floats]:
    """Return how far the interval of level 1 - alpha reaches below and above the mean, each `[K]`.

    Each source's own half width, added in squares: exact for one source, and never much below its level for several,
    where one Student quantile for their sum (Satterthwaite) falls short when seeds are few.
    """
    down = up = np.zeros(())
    for source in sources:
        squared = scipy.stats.t.isf(np.asarray(alpha) / 2, source.dof) ** 2 * source.variance
        down, up = down + squared * np.square(source.down), up + squared * np.square(source.up)
    return np.sqrt(down), np.sqrt(up)


def p_values(mean: Floats, sources: Sequence[Source]) -> Floats:
    """Return for each of K the smallest alpha whose interval excludes zero, at least `SMALLEST_P`; 1 for a mean of zero."""
    low, high = np.full(mean.shape, np.log(SMALLEST_P)), np.zeros(mean.shape)
    # Bisection in log alpha: the half width falls as alpha grows, to nothing at 1.
    for _ in range(50):
        middle = (low + high) / 2
        down, up = half_widths(sources, np.exp(middle))
        excludes = np.where(mean > 0, down, up) < np.abs(mean)
        low, high = np.where(excludes, low, middle), np.where(excludes, middle, high)
    return np.where(mean == 0, 1.0, np.exp(high))


def _lopsidedness(columns_KN: Floats, num_resamples: int, seed: int) -> tuple[Floats, Floats]:
    """Return how much further than Student's the studentised bootstrap of the mean of N examples reaches, down and up."""
    num_examples = columns_KN.shape[1]
    generator = np.random.default_rng(seed)
    block = max(1, min(num_resamples, BLOCK_ELEMENTS // num_examples))
    t_RK = []
    centred_KN = columns_KN - columns_KN.mean(1, keepdims=True)
    for start in range(0, num_resamples, block):
        weights_BN = _counts(generator, min(block, num_resamples - start), num_examples)
        means_BK = weights_BN @ centred_KN.T / num_examples
        variance_BK = weights_BN @ np.square(centred_KN.T) / num_examples - means_BK**2
        # A resample of equal examples says nothing about its own spread.
        known = variance_BK > 1e-12 * np.square(centred_KN).mean(1)
        error_BK = np.sqrt(np.where(known, variance_BK, 1.0) / (num_examples - 1))
        t_RK.append(np.where(known, means_BK / error_BK, 0.0))
    low, high = np.quantile(np.concatenate(t_RK), (REFERENCE_ALPHA / 2, 1 - REFERENCE_ALPHA / 2), axis=0)
    student = scipy.stats.t.isf(REFERENCE_ALPHA / 2, num_examples - 1)
    # A mean that is too high by chance comes with a large t: the upper tail says how far down the truth may lie.
    return tuple(np.clip(side / student, 1 / LOPSIDED, LOPSIDED) for side in (high, -low))


def _counts(generator: np.random.Generator, size: int, num: int) -> Floats:
    """Return `[size, num]` counts of `num` draws with replacement; faster than multinomial draws."""
    draws = generator.integers(0, num, size=(size, num)) + num * np.arange(size)[:, None]
    counts: Floats = np.bincount(draws.ravel(), minlength=size * num).astype(np.float64)
    return counts.reshape(size, num)
