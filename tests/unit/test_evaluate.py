"""What `evaluate` answers from: an adapter merged, or, where no weight can hold it, attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contracts.tiny import randomise
from invariants.micro import save_micro_model

from ssmtune.attach import AdaptedModel, attach
from ssmtune.evaluate import EvaluateConfig, answer, evaluate, evaluation_model
from ssmtune.models import load_model, load_tokenizer
from ssmtune.plan import make_plan
from ssmtune.tasks.base import messages, split
from ssmtune.training_data import task_examples

SIZE = 0.001
NUM_EXAMPLES = 2


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_micro_model(tmp_path_factory.mktemp("micro")))


def completions(model_path: str, adapter: Path | None) -> list[str]:
    """What `evaluate` records as written."""
    config = EvaluateConfig(
        model=model_path,
        task="classification",
        size=SIZE,
        num_examples=NUM_EXAMPLES,
        adapter=None if adapter is None else str(adapter),
    )
    return [sample["completion"] for sample in evaluate(config, progress=False)["samples"]]


def written_by(model: Any, model_path: str) -> list[str]:
    """What a model in memory writes to the same questions."""
    examples = split(task_examples("classification", SIZE)).test[:NUM_EXAMPLES]
    prompts = [messages(example)[0] for example in examples]
    found = answer(model, load_tokenizer(model_path), prompts, max_new_tokens=32, progress=False)
    return [text for text, _ in found]


@pytest.mark.parametrize(
    "recipe", ["initial-state", "state-offset-h", "additional-scan", "affix", "hankel", "all+core"]
)
def test_answers_are_those_of_the_adapted_model(recipe: str, model_path: str, tmp_path: Path) -> None:
    model = load_model(model_path, dtype="float32")
    adapted = attach(model, make_plan(model, recipe))
    randomise(adapted, scale=0.5)
    adapted.save_pretrained(tmp_path)
    expected = written_by(adapted.eval(), model_path)
    assert completions(model_path, tmp_path) == expected
    assert expected != completions(model_path, None)
    found = evaluation_model(EvaluateConfig(model=model_path, task="classification", adapter=str(tmp_path)))
    assert isinstance(found, AdaptedModel) == (recipe != "all+core")
