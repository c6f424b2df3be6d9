"""Statistics: known values, and small simulations of what intervals and p-values promise."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats

from ssmtune import stats
from ssmtune.errors import DataError

DESIGNS = [(5, 200, 0.02, 0.3, 0.3), (3, 200, 0.0, 0.3, 0.3), (1, 200, 0.0, 0.3, 0.3)]


def _scores(generator: np.random.Generator, design: tuple[int, int, float, float, float], effect: float) -> np.ndarray:
    num_seeds, num_examples, sd_seed, sd_example, sd_noise = design
    noise = sd_noise * generator.standard_normal((num_seeds, num_examples))
    seeds = sd_seed * generator.standard_normal((num_seeds, 1))
    return effect + noise + seeds + sd_example * generator.standard_normal((1, num_examples))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_interval_covers_and_p_is_honest(design: tuple[int, int, float, float, float], effect: float) -> None:
    generator = np.random.default_rng(7)
    num, covered, found = 150, 0, 0
    for k in range(num):
        scores = _scores(generator, design, effect)
        result = stats.paired_difference(scores, np.zeros_like(scores), num_resamples=400, seed=k)
        covered += result.low <= effect <= result.high
        found += result.p <= 0.05
    # Three standard errors of a share of 0.95 (0.05) over 150 simulations: 0.053.
    assert covered / num >= 0.95 - 0.053
    assert covered / num < 1.0
    if effect == 0:
        assert found / num <= 0.05 + 0.053
    else:
        assert found / num > 0.3


def test_p_and_interval_agree() -> None:
    generator = np.random.default_rng(3)
    for k in range(30):
        scores = _scores(generator, DESIGNS[0], 0.06)
        result = stats.paired_difference(scores, np.zeros_like(scores), num_resamples=400, seed=k)
        assert (result.p < 0.05) == (not result.low <= 0 <= result.high)


def test_one_seed_agrees_with_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.1, 1, 400), generator.normal(0, 1, 400)
    result = stats.paired_difference(a, b, num_resamples=20_000, seed=0)
    expected = scipy.stats.ttest_rel(a, b)
    assert result.p == pytest.approx(expected.pvalue, abs=0.02)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()), abs=0.01)


def test_equal_arms_and_constant_difference() -> None:
    ones = np.ones((3, 10))
    same = stats.paired_difference(ones, ones, num_resamples=100, seed=0)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    apart = stats.paired_difference(ones, 0 * ones, num_resamples=100, seed=0)
    assert (apart.low, apart.high) == (1.0, 1.0) and apart.p < 0.05


def test_base_row_is_used_for_every_seed_and_order_flips_the_sign() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.random((4, 50)), generator.random(50)
    one = stats.paired_difference(a, b, num_resamples=200, seed=5)
    repeated = stats.paired_difference(a, np.tile(b, (4, 1)), num_resamples=200, seed=5)
    assert one == repeated
    assert stats.paired_difference(b, a, num_resamples=200, seed=5).difference == pytest.approx(-one.difference)
    assert one.num_seeds == 4 and len(one.per_seed) == 4


def test_full_size_is_fast() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.integers(0, 2, (2, 8, 2437))
    start = time.perf_counter()
    stats.paired_difference(a, b, seed=0)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("shapes", [((2, 5), (3, 5)), ((2, 5), (2, 6)), ((2, 1), (2, 1))])
def test_unpaired_scores_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(DataError, match="paired_difference: got"):
        stats.paired_difference(np.ones(shapes[0]), np.ones(shapes[1]), seed=0)


def test_nan_is_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        stats.paired_difference([[1.0, float("nan")]], [[0.0, 0.0]], seed=0)


def test_holm_known_values() -> None:
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") and an unsorted one with a tie at the cap.
    assert stats.holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert stats.holm([0.6, 0.001, 0.9, 0.02]) == pytest.approx([1.0, 0.004, 1.0, 0.06])
    assert stats.holm([]) == []


def test_wilson_known_value_and_limits() -> None:
    interval = stats.wilson_interval(8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert stats.wilson_interval(0, 10).low == 0.0
    with pytest.raises(DataError, match="got 11 of 10"):
        stats.wilson_interval(11, 10)


def test_mean_interval() -> None:
    interval = stats.mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653; standard error 1 / sqrt 3.
    assert (interval.low, interval.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert stats.mean_interval([0.4]).low is None
    assert stats.clipped(interval).low == 0.0 and stats.clipped(interval).high == 1.0
    with pytest.raises(DataError):
        stats.mean_interval([])


def test_minimum_detectable_effect_known_design() -> None:
    # 1,764 items with a paired spread of 0.45 resolve 3 points at a power of 80 %.
    assert stats.minimum_detectable_effect(num_seeds=1, num_examples=1764, sd_noise=0.45) == pytest.approx(
        0.03, abs=1e-4
    )
    one = stats.minimum_detectable_effect(num_seeds=3, num_examples=500, sd_noise=0.45)
    assert stats.minimum_detectable_effect(num_seeds=3, num_examples=500, sd_noise=0.45, num_comparisons=9) > one
    assert stats.minimum_detectable_effect(num_seeds=3, num_examples=500, sd_noise=0.45, sd_seed=0.02) > one


def _comparison(low: float, high: float, p: float, p_holm: float | None) -> stats.Comparison:
    middle = (low + high) / 2
    result = stats.Difference(
        difference=middle,
        low=low,
        high=high,
        p=p,
        standard_error=0.01,
        dof=10.0,
        sd_seed=0.0,
        sd_example=0.1,
        sd_noise=0.1,
        num_seeds=2,
        num_examples=100,
        per_seed=(middle, -middle),
    )
    return stats.Comparison(arm="V4", baseline="V2", task="t", metric="exact", result=result, p_holm=p_holm)


@pytest.mark.parametrize(
    ("low", "high", "p", "p_holm", "expected"),
    [
        (0.01, 0.05, 0.01, 0.03, "higher"),
        (-0.05, -0.01, 0.01, 0.03, "lower"),
        (-0.01, 0.05, 0.10, 0.10, "no difference"),
        (0.01, 0.05, 0.01, 0.09, "no difference"),
        (0.01, 0.05, 0.01, None, "higher"),
    ],
)
def test_a_win_inside_the_interval_is_no_difference(
    low: float, high: float, p: float, p_holm: float | None, expected: str
) -> None:
    comparison = _comparison(low, high, p, p_holm)
    assert stats.verdict(comparison) == expected
    plain = comparison.to_dict()
    assert plain["verdict"] == expected and (plain["seeds_same_sign"], plain["seeds_compared"]) == (1, 2)
