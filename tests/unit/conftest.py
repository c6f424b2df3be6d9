"""What several files of tests here start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmtune.attach import attach
from ssmtune.models import load_model
from ssmtune.plan import make_plan


@pytest.fixture(scope="session")
def bundled_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of every kind of site on the bundled model, moved away from zero: the same one whatever ran before.

    PEFT draws its factors from the global generator. With this seed the two best tokens of every step in
    `test_evaluate_llamacpp.py` are at least 0.03 apart, which no order of summation bridges; with others it is a
    thousandth. Moved by 0.05 the model is so far gone that four bits a weight cost more than a nat.
    """
    directory = tmp_path_factory.mktemp("bundled") / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = load_model("tiny-granite-h")
        adapted = attach(model, make_plan(model, "all+core", rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return directory
