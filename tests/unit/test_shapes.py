"""The shapes that are benchmarked: each is a config that loads, counts what its model is published with, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssmtune.models import empty_model
from ssmtune.plan import make_plan

SHAPES = Path(__file__).parents[2] / "benchmarks/shapes"

COUNTS = {
    "falcon-h1-1.5b": 1_554_789_760,
    "granite-4.0-h-micro": 3_191_396_096,
    "mamba2-2.7b": 2_702_599_680,
    "nemotron-h-4b": 4_489_223_040,
    "qwen3.5-4b": 4_205_751_296,
}
"""Parameters, as the README beside the shapes has them."""


def test_every_shape_has_a_count() -> None:
    assert set(COUNTS) == {path.stem for path in SHAPES.glob("*.json")}
    text = (SHAPES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.json`" in text and f"{count:,}" in text for name, count in COUNTS.items())


@pytest.mark.parametrize("name", COUNTS)
def test_a_shape_is_the_model_that_it_names(name: str) -> None:
    model = empty_model(str(SHAPES / f"{name}.json"))
    plan = make_plan(model, "all+core")
    assert plan.total == COUNTS[name]
    assert {site.method for site in plan.sites} == {"lora", "core"} and str(model.dtype) == "torch.bfloat16"
    # Rows can be computed again in the backward pass, which long rows are measured with.
    assert model.supports_gradient_checkpointing
