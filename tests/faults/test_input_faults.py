"""Faults between documents: packed documents that see each other, padding that reaches real tokens."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from planting import Make, Run, make_base, replace_operation

from ssmtune import operations
from ssmtune.families import granite_hybrid
from ssmtune.ops.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("lost", ["seq_idx", "attention mask", "both"])
def test_packed_documents_that_leak(make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    prepare = granite_hybrid.FAMILY.prepare_packed
    assert prepare is not None

    def leaking(backbone: Any, position_ids: Any, seq_idx: Any) -> dict[str, Any]:
        kept = dict(prepare(backbone, position_ids, seq_idx))
        if lost != "attention mask":
            kept.pop("seq_idx")
        if lost != "seq_idx":
            kept.pop("attention_mask")
        return kept

    install = operations.install_operations
    monkeypatch.setattr(
        import_module("ssmtune.attach"),
        "install_operations",
        lambda model, family: install(model, replace(family, prepare_packed=leaking)),
    )
    result = run("packing", make())
    assert not result.ok and result.measured > 100 * result.limit
    # The first document has nothing before it to see.
    assert "document 1 of 3" in result.where or "document 2 of 3" in result.where


def test_padding_that_reaches_real_tokens(make: Make, run: Run) -> None:
    base = make_base("odd")
    with torch.no_grad():
        for layer in base.model.layers:
            if layer.mamba is not None:
                layer.mamba.in_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    adapted = make(base=base)
    assert run("padding", adapted).ok

    def unmasked(x: Any, weight: Any, bias: Any = None, activation: Any = None, **_: Any) -> torch.Tensor:
        return causal_conv1d(x, weight, bias, activation)

    # The layer zeroes the input of a pad, but the projection's bias makes it non-zero again before the convolution.
    replace_operation(adapted, 1, causal_conv1d_fn=unmasked)
    result = run("padding", adapted)
    assert not result.ok and "left padding" in result.where
