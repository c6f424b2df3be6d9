"""Statistics: known values, and small simulations of what intervals and p-values promise."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import scipy.stats
import statsmodels.formula.api
import statsmodels.stats.anova
import statsmodels.stats.multitest
import statsmodels.stats.power
import statsmodels.stats.weightstats

from ssmtune import stats
from ssmtune.errors import DataError


def _recipe() -> Any:
    path = Path(__file__).parents[2] / "recipes" / "check_statistics.py"
    spec = importlib.util.spec_from_file_location("check_statistics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIMULATE = _recipe()
NUM = 400


def _bound(share: float, num: int = NUM) -> float:
    """Three standard errors of a share over `num` simulations."""
    return float(3 * np.sqrt(share * (1 - share) / num))


@pytest.mark.parametrize("design", [d for d in SIMULATE.NORMAL if d["seeds"] in (1, 2, 5)], ids=str)
def test_intervals_cover_the_truth(design: dict[str, Any]) -> None:
    found = SIMULATE.coverage(design, NUM)
    assert found["share"] >= 0.95 - _bound(0.95)
    if design["seeds"] == 5:
        assert found["share"] <= 0.97 + _bound(0.97), "at five seeds an interval should not be much too wide either"


@pytest.mark.parametrize("design", SIMULATE.BINARY, ids=str)
def test_intervals_of_right_and_wrong_answers_cover_the_truth(design: dict[str, Any]) -> None:
    assert 0.95 - _bound(0.95) <= SIMULATE.coverage(design, NUM)["share"] <= 0.97 + _bound(0.97)


def test_percentile_bootstrap_would_fall_short() -> None:
    """What this package does not do: seeds and examples resampled together, and quantiles of that."""
    design = {"seeds": 5, "examples": 60, "sd_seed": 0.2, "sd_example": 0.0, "sd_noise": 0.3}
    generator = np.random.default_rng(0)
    d_KSN = SIMULATE.normal_differences(generator, NUM, design)
    by_seed = generator.multinomial(5, np.full(5, 0.2), size=400) / 5
    by_example = generator.multinomial(60, np.full(60, 1 / 60), size=400) / 60
    means_KR = np.einsum("rs,ksn,rn->kr", by_seed, d_KSN, by_example, optimize=True)
    low, high = np.quantile(means_KR, (0.025, 0.975), axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.95 - _bound(0.95)
    held, _ = SIMULATE.covers(d_KSN, 0.0)
    assert held.mean() >= 0.95 - _bound(0.95)


def test_one_quantile_for_the_sum_of_variances_would_fall_short() -> None:
    """What earlier versions did: Satterthwaite's degrees of freedom for the sum of the variances, here with two seeds."""
    design = {"seeds": 2, "examples": 200, "sd_seed": 0.05, "sd_example": 0.1, "sd_noise": 0.3}
    d_KSN = SIMULATE.normal_differences(np.random.default_rng(0), 2 * NUM, design)
    mean, size = d_KSN.mean((1, 2)), 2 * 200
    by_seed, by_example = 200 * d_KSN.mean(2).var(1, ddof=1), 2 * d_KSN.mean(1).var(1, ddof=1)
    rest_KSN = d_KSN - d_KSN.mean(2)[:, :, None] - d_KSN.mean(1)[:, None] + mean[:, None, None]
    rest = (rest_KSN**2).sum((1, 2)) / 199
    total = np.maximum(by_seed - rest, 0) + np.maximum(by_example - rest, 0) + rest
    dof = np.maximum(total**2 / (by_seed**2 + by_example**2 / 199 + rest**2 / 199), 1)
    held = np.abs(mean) <= scipy.stats.t.isf(0.025, dof) * np.sqrt(total / size)
    assert held.mean() < 0.95 - _bound(0.95, 2 * NUM)
    assert SIMULATE.covers(d_KSN, 0.0)[0].mean() >= 0.95 - _bound(0.95, 2 * NUM)


@pytest.mark.parametrize("design", [d for d in SIMULATE.FAMILIES if d["comparisons"] == 8], ids=str)
def test_families_without_a_difference_rarely_show_one(design: dict[str, Any]) -> None:
    assert SIMULATE.false_families(design, NUM)["share"] <= 0.05 + _bound(0.05)


def test_unadjusted_families_would_show_one() -> None:
    """The families above are hard enough: without Holm's adjustment far more of them show a difference."""
    generator = np.random.default_rng(0)
    scores = SIMULATE.answers(generator, 1.0 + 0.3 * generator.standard_normal((NUM, 9, 5)), 100)
    p_K = SIMULATE.p_values((scores[:, 1:] - scores[:, :1]).reshape(-1, 5, 100))
    assert (p_K.reshape(NUM, 8).min(1) <= 0.05).mean() > 0.15


def test_placements_drawn_like_the_random_ones_rarely_differ_from_them() -> None:
    design = {**SIMULATE.NULLS[2], "examples": 40}
    assert 0.05 - _bound(0.05) <= SIMULATE.false_nulls(design, NUM)["share"] <= 0.05 + _bound(0.05)


def test_null_holds_the_spread_of_its_draws() -> None:
    generator = np.random.default_rng(0)
    noise = 0.01 * generator.standard_normal((4, 1, 5, 50))
    arm, draws = 0.9 + noise[:1], np.array([0.7, 0.8, 0.6])[:, None, None, None] + noise[1:]
    against_mean = stats.paired_difference(arm, draws, seed=0)
    against_null = stats.paired_difference(arm, draws, seed=0, is_null=True)
    assert against_mean.difference == against_null.difference == pytest.approx(0.2, abs=0.01)
    assert (against_null.num_draws, against_null.is_null) == (3, True)
    assert against_null.sd_draw == pytest.approx(0.1, abs=0.01)
    # One more placement drawn like these: Student's t with 2 dof, sd 0.1 * sqrt(1 + 1/3); their mean: 0.1 / sqrt(3).
    for found, factor in ((against_null, 4 / 3), (against_mean, 1 / 3)):
        half = scipy.stats.t.isf(0.025, 2) * found.sd_draw * factor**0.5
        assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.01)
    assert against_null.p > 0.05 >= stats.paired_difference(arm, draws.mean(0), seed=0).p
    with pytest.raises(DataError, match="two or more on one side alone"):
        stats.paired_difference(draws, draws, seed=0, is_null=True)


def test_data_orders_are_paired_and_add_their_spread() -> None:
    generator = np.random.default_rng(0)
    order = np.array([0.0, 0.3, -0.3])[:, None, None]
    base = generator.random((3, 5, 40)) + order
    shared = stats.paired_difference(base + 0.1, base, seed=0)
    assert shared.difference == pytest.approx(0.1) and shared.sd_order == pytest.approx(0, abs=1e-12)
    apart = stats.paired_difference(base + order + 0.1, base, seed=0)
    assert apart.sd_order == pytest.approx(0.3) and apart.num_orders == 3
    assert apart.high - apart.difference == pytest.approx(scipy.stats.t.isf(0.025, 2) * 0.3 / 3**0.5)


@pytest.mark.parametrize("design", SIMULATE.POWERS, ids=str)
def test_smallest_detectable_effect_is_found_as_often_as_stated(design: dict[str, Any]) -> None:
    # Several sources have no exact distribution: two points either way.
    assert abs(SIMULATE.power(design, NUM)["share"] - 0.8) <= 0.02 + _bound(0.8)


def test_seeds_alone_agree_with_the_t_test_over_seed_means() -> None:
    generator = np.random.default_rng(2)
    d_SN = np.repeat(generator.normal(0.1, 0.1, (5, 1)), 30, axis=1)
    result = stats.paired_difference(d_SN, 0 * d_SN, seed=0)
    expected = scipy.stats.ttest_1samp(d_SN.mean(1), 0)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)


def test_spreads_agree_with_the_analysis_of_variance_of_statsmodels() -> None:
    generator = np.random.default_rng(4)
    d_SN = _scores(generator, (4, 12, 0.3, 0.4, 0.3), 0.0)
    seeds, examples = (axis.ravel() for axis in np.indices(d_SN.shape))
    frame = pandas.DataFrame({"d": d_SN.ravel(), "seed": seeds, "example": examples})
    squares = statsmodels.stats.anova.anova_lm(
        statsmodels.formula.api.ols("d ~ C(seed) + C(example)", data=frame).fit()
    )["mean_sq"]
    result = stats.paired_difference(d_SN, 0 * d_SN, seed=0)
    assert result.sd_noise**2 == pytest.approx(squares["Residual"])
    assert result.sd_seed**2 == pytest.approx((squares["C(seed)"] - squares["Residual"]) / 12)
    assert result.sd_example**2 == pytest.approx((squares["C(example)"] - squares["Residual"]) / 4)
    assert result.errors["seeds"] == pytest.approx((np.sqrt(squares["C(seed)"] / 48), 3))


def test_lopsided_scores_agree_with_a_studentised_bootstrap_done_at_length() -> None:
    generator = np.random.default_rng(5)
    scores = generator.exponential(1.0, 40) ** 2
    result = stats.paired_difference(scores, 0 * scores, seed=0, num_resamples=20_000)
    resampled = generator.choice(scores, (20_000, 40))
    t = (resampled.mean(1) - scores.mean()) / scipy.stats.sem(resampled, axis=1)
    low, high = scores.mean() - np.quantile(t, (0.975, 0.025)) * scipy.stats.sem(scores)
    # Two bootstraps of 20,000 resamples differ by some percent of a half width in the tails.
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.06 * (high - low))
    assert result.high - result.difference > 1.3 * (result.difference - result.low)


def test_equivalence_agrees_with_two_one_sided_tests() -> None:
    generator = np.random.default_rng(6)
    a, b = generator.normal(0.02, 0.3, 300), generator.normal(0, 0.3, 300)
    result = stats.paired_difference(a, b, seed=0, num_resamples=20_000)
    margin = stats.no_larger_than(result)
    # The smallest margin at which both one-sided tests reject at 2.5 %.
    p = statsmodels.stats.weightstats.ttost_paired(a, b, -margin, margin)[0]
    assert p == pytest.approx(0.025, abs=0.003)
    made = stats.Comparison(arm="a", baseline="b", task="t", metric="m", result=result, margin=1.01 * margin)
    assert made.to_dict()["equivalent"] is True
    assert dataclasses.replace(made, margin=0.99 * margin).to_dict()["equivalent"] is False
    assert dataclasses.replace(made, margin=None).to_dict()["equivalent"] is None


def _scores(generator: np.random.Generator, design: tuple[int, int, float, float, float], effect: float) -> np.ndarray:
    num_seeds, num_examples, sd_seed, sd_example, sd_noise = design
    noise = sd_noise * generator.standard_normal((num_seeds, num_examples))
    seeds = sd_seed * generator.standard_normal((num_seeds, 1))
    return effect + noise + seeds + sd_example * generator.standard_normal((1, num_examples))


def test_p_and_interval_agree() -> None:
    generator = np.random.default_rng(3)
    for k in range(30):
        scores = _scores(generator, (5, 200, 0.02, 0.3, 0.3), 0.06)
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
    p_values = list(np.random.default_rng(0).random(20) ** 3)
    adjusted = statsmodels.stats.multitest.multipletests(p_values, method="holm")[1]
    assert stats.holm(p_values) == pytest.approx(list(adjusted))


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
    # statsmodels knows the noncentral t of one sample.
    alone = stats.minimum_detectable_effect(num_seeds=1, num_examples=60, sd_noise=1.0)
    exact = statsmodels.stats.power.TTestPower().solve_power(nobs=60, alpha=0.05, power=0.8)
    assert alone == pytest.approx(exact, rel=1e-4)
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
        errors={"examples": (0.01, 99.0)},
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
