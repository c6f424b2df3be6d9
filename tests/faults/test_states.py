"""What acts on states and before the text passes the checks that it can fail, and the checks see it where it is lost."""

from __future__ import annotations

from typing import Any

import pytest
from planting import Make, Run

from ssmtune.methods._positions import Positions


@pytest.mark.parametrize("recipe", ["initial-state", "affix", "additional-scan", "memba", "prompt", "prefix"])
def test_sound_adapters_pass(recipe: str, make: Make, run: Run) -> None:
    adapted = make(recipe)
    for check in ("coverage", "liveness"):
        result = run(check, adapted)
        assert result.ok, (check, result.where, result.detail)


def test_positions_that_a_cached_pass_leaves_out(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make("affix", num_steps=1)
    monkeypatch.setattr("ssmtune.operations._continues", lambda call: call.cache is not None)
    result = run("liveness", adapted)
    assert not result.ok
    assert "affix.table on path decode from the first token" in result.where
    agree = run("paths_agree", adapted)
    assert not agree.ok and "decode, token 0" in agree.where


def test_membranes_that_a_cache_does_not_keep(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = make("memba")
    assert run("paths_agree", adapted).ok
    monkeypatch.setattr("ssmtune.ops.membrane._keep", lambda layer, leaving: None)
    result = run("paths_agree", adapted)
    assert not result.ok and "decode" in result.where


def test_positions_that_are_fewer_than_planned(make: Make, run: Run) -> None:
    adapted = make("prompt", num_steps=1)
    shorter = Positions(adapted.config.hidden_size, num_tokens=15, std=0.02)
    key, edit = next(iter(adapted.edits.items()))
    edit.__dict__.update(shorter.__dict__)
    result = run("coverage", adapted)
    assert not result.ok and result.where == key and "trains 480 parameters, the plan says 512" in result.detail


def test_a_prompt_that_packed_documents_do_not_get(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the positions come once per row, as a prompt in front of the row would."""
    from ssmtune import virtual_tokens

    def once(num_tokens: int, mask: Any, seq_idx: Any) -> Any:
        return original(num_tokens, mask, None)

    adapted = make("prompt", num_steps=1)
    original = virtual_tokens.Insertion
    monkeypatch.setattr("ssmtune.virtual_tokens.Insertion", once)
    assert not run("packing", adapted).ok
