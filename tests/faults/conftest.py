"""Fixtures of the planted faults."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import Make, Run, make_base

from ssmtune.attach import AdaptedModel, attach, load
from ssmtune.plan import make_plan
from ssmtune.verify import sample_documents
from ssmtune.verify.base import CheckResult, Subject, get_check
from ssmtune.verify.forward import path_logits
from ssmtune.verify.fresh import fresh_base

# PEFT 0.21 reads an attribute that transformers 5.23 calls deprecated; nothing of ours can avoid it.
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Forgive PEFT's warning in this folder, where every test builds a `PeftModel`."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings(PEFT_WARNING))


@pytest.fixture
def make() -> Make:
    """Return a function that gives a trained adapter: three AdamW steps at 1e-3 on random tokens."""

    def trained(
        recipe: str = "all+core",
        config: str = "dense",
        dtype: torch.dtype = torch.float32,
        *,
        num_steps: int = 3,
        base: Any = None,
        **options: Any,
    ) -> AdaptedModel:
        base = make_base(config, dtype) if base is None else base
        adapted = attach(base, make_plan(base, recipe, **{"rank": 4, **options}))
        optimizer = torch.optim.AdamW(adapted.trained_parameters().values(), lr=1e-3)
        ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(0))
        adapted.train()
        for _ in range(num_steps):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapted

    return trained


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs one check on an adapted model, saved as it is unless a directory is given."""

    def one(name: str, adapted: AdaptedModel, *, directory: Path | None = None) -> CheckResult:
        if directory is None:
            directory = tmp_path / "adapter"
            adapted.save_pretrained(directory)
        documents = sample_documents(adapted, None)
        return get_check(name).run(Subject(adapted=adapted, documents=documents, directory=directory, scratch=tmp_path))

    return one


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let check `reload` load in this process, which takes milliseconds; test_sound covers the process itself."""

    def logits(subject: Subject, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        adapted = load(fresh_base(subject), subject.directory)
        with torch.no_grad(), adapted.disable_adapter():
            base = path_logits(adapted, "eval", ids_BT)
        with torch.no_grad():
            return path_logits(adapted, "eval", ids_BT), base

    monkeypatch.setattr(import_module("ssmtune.verify.reload"), "logits_of_fresh_process", logits)
