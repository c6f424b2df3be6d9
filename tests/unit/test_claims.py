"""What follows for a claim is what its comparisons' intervals say: rows with known intervals, records there and not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ssmtune.records import new_record, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import claims  # noqa: E402


def row(low: float, high: float, p_holm: float | None = 0.001, **facts: Any) -> dict[str, Any]:
    """A comparison with that interval."""
    given = {"task": "t", "difference": (low + high) / 2, "low": low, "high": high, "p": 0.001, "p_holm": p_holm}
    return {**given, "alpha": 0.05, "standard_error": (high - low) / 3.92, **facts}


HIGHER, LOWER, OPEN, SMALL = row(0.1, 0.2), row(-0.2, -0.1), row(-0.1, 0.1, 0.8), row(-0.02, 0.03, 0.8)


@pytest.mark.parametrize(
    ("rows", "expected", "found"),
    [
        ([HIGHER, HIGHER], "higher", "replicated"),
        ([HIGHER, OPEN, OPEN], "higher", "replicated in 1 of 3"),
        ([OPEN, OPEN], "higher", "not replicated: nothing resolved"),
        ([HIGHER, LOWER], "higher", "not replicated: so in 1 of 2, the opposite in 1"),
        ([LOWER], "lower", "replicated"),
        ([HIGHER], "lower", "not replicated: the opposite in 1 of 1"),
        # An interval that excludes zero is not enough where the adjusted p is too large.
        ([row(0.001, 0.2, 0.2)], "higher", "not replicated: nothing resolved"),
        ([SMALL], "equal", "replicated"),
        ([OPEN], "equal", "not replicated: nothing resolved"),
        # Resolved, and yet within the margin: that it differs does not matter.
        ([row(0.01, 0.03)], "equal", "replicated"),
        ([HIGHER], "equal", "not replicated: the opposite in 1 of 1"),
        # Both arms at the floor.
        ([row(0.0, 0.0, 1.0)], "equal", "not replicated: nothing resolved"),
        ([OPEN, LOWER], "no higher", "replicated"),
        ([HIGHER], "no higher", "not replicated: the opposite in 1 of 1"),
        ([], "higher", "not run"),
    ],
)
def test_verdicts_follow_from_intervals(rows: list[dict[str, Any]], expected: claims.Says, found: str) -> None:
    assert claims.verdict(rows, expected) == found


def test_one_comparison_reads_as_the_study_reads_it() -> None:
    """The study's own verdict and the one here agree on every comparison of a real record."""
    record = claims.stored(claims.GRANITE)
    assert record is not None
    assert len(record["comparisons"]) == 24
    for comparison in record["comparisons"]:
        assert claims.direction(comparison) == comparison["verdict"]


def test_a_claim_is_judged_by_its_own_comparisons(tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    judge = claims.compared(path, ("a", "b"), "higher", tasks=("t",))
    assert judge() == claims.Finding(verdict="not run")
    rows = [
        row(0.1, 0.2, arm="a", baseline="b"),
        row(-0.2, -0.1, arm="b", baseline="a"),
        row(-0.2, -0.1, arm="a", baseline="b", task="other"),
    ]
    write_json(path, new_record("study", config={}, comparisons=rows))
    claims.stored.cache_clear()
    finding = judge()
    assert (finding.verdict, finding.record) == ("replicated", path)
    assert finding.figures == "t: +0.150 [+0.100, +0.200]"
    assert claims.compared(path, ("a", "c"), "higher")().verdict == "not run"


def test_harm_is_judged_where_something_can_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(score: float, found: dict[str, Any]) -> claims.Finding:
        place = {"model": "m.sequential", "trained_on": "t", "evaluated_on": "u"}
        arm = {"name": "base", "metrics": {"exact": {"mean": score}}}
        path = tmp_path / f"{score}.json"
        tasks = [{**place, "primary": "exact", "arms": [arm]}]
        rows = [{**found, **place, "arm": "recurrent", "baseline": "base"}]
        rows += [{**LOWER, **place, "arm": "attention", "baseline": "base"}]
        write_json(path, new_record("study", config={}, tasks=tasks, comparisons=rows))
        monkeypatch.setattr(claims, "PLACEMENT", path)
        return claims.harm("sequential")()

    assert judged(0.0, row(0.0, 0.0, 1.0)).verdict == "not testable here: the untrained models are at the floor"
    assert judged(0.3, LOWER).verdict == "replicated"
    assert judged(0.32, LOWER).figures.endswith("; LoRA on attention is below the base as well in 1 of 1")
    assert judged(0.31, HIGHER).verdict == "not replicated: the opposite in 1 of 1"
    assert claims.harm("parallel")() == claims.Finding(verdict="not run")


def test_many_comparisons_are_shown_by_their_extremes() -> None:
    rows = [row(0.1 * i - 0.05, 0.1 * i + 0.05, task=f"t{i}") for i in range(6)]
    text = claims.figures(rows)
    assert text == "6 comparisons, from t0: +0.000 [-0.050, +0.050] to t5: +0.500 [+0.450, +0.550]"


def test_a_contrast_of_two_differences() -> None:
    """Errors of 0.03 and 0.04 add up to 0.05."""
    one, other = ({"difference": d, "standard_error": e} for d, e in ((0.2, 0.03), (0.05, 0.04)))
    found = claims.contrast(one, other, "x")
    assert found["difference"] == pytest.approx(0.15)
    assert (found["low"], found["high"]) == pytest.approx((0.15 - 1.96 * 0.05, 0.15 + 1.96 * 0.05), abs=1e-5)
    assert found["p"] == pytest.approx(0.0027, abs=1e-4)


def test_the_topology_contrast_pairs_models_of_one_recurrence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"arm": "recurrent", "baseline": "base", "trained_on": "x", "evaluated_on": "y"}
    rows = [
        row(-0.3, -0.2, model="delta.sequential", **facts),
        row(0.2, 0.3, model="delta.parallel", **facts),
        row(-0.05, 0.05, model="mamba2.sequential", **facts),
        row(-0.05, 0.05, model="mamba2.parallel", **facts),
    ]
    path = tmp_path / "study.json"
    monkeypatch.setattr(claims, "PLACEMENT", path)
    assert claims.topology_contrast().verdict == "not run"
    write_json(path, new_record("study", config={}, comparisons=rows))
    claims.stored.cache_clear()
    finding = claims.topology_contrast()
    assert finding.verdict == "replicated in 1 of 2"
    assert "delta: x -> y: -0.500" in finding.figures
