"""Learned positions before the text of one recurrent layer: run once, and what they leave behind is all of their effect.

A causal recurrent layer hands on its state and the last inputs of its convolution and nothing else, and the positions do
not depend on the text, so a sequence that starts from both is exactly one with the positions in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ssmtune.ops.seam import Call, Start

Ranges = Sequence[tuple[int, int]]


def run_affix(module: nn.Module, call: Call, entry_rows: Mapping[str, Ranges], hidden_BTD: torch.Tensor) -> Start:
    """Return what the layer's affix leaves behind, run through the layer's own forward; differentiable in the affix.

    The affix [M, W] stands in for the rows `entry_rows` of the layer's projections, in this order; other rows read zero.
    The positions start from the trained initial state where there is one. `hidden_BTD` gives width, dtype and device.
    """
    rows_MW = call.state("affix")
    assert rows_MW is not None
    recorded: dict[str, torch.Tensor] = {}
    zeros = hidden_BTD.new_zeros(1, rows_MW.shape[0], hidden_BTD.shape[-1])
    before = replace(call)
    call.seq_idx = call.padding_mask = call.cache = call.start = None
    call.num_steps, call.hidden_BTD, call.recorded = zeros.shape[1], zeros, recorded
    try:
        with _projecting(module, rows_MW, entry_rows):
            module.forward(zeros)
    finally:
        for name, value in vars(before).items():
            setattr(call, name, value)
    return Start(state=recorded["state"].squeeze(0), window_CK=recorded["window"].squeeze(0))


@contextmanager
def _projecting(module: nn.Module, rows_MW: torch.Tensor, entry_rows: Mapping[str, Ranges]) -> Iterator[None]:
    """Let the projections give the affix in this block, whatever they are given."""
    handles = []
    taken = 0
    try:
        for name, ranges in entry_rows.items():
            index = torch.cat([torch.arange(first, end) for first, end in ranges]).to(rows_MW.device)
            values = rows_MW[:, taken : taken + len(index)]
            handles.append(module.get_submodule(name).register_forward_hook(_giving(index, values)))
            taken += len(index)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _giving(index: torch.Tensor, values_MR: torch.Tensor) -> Any:
    def hook(projection: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output).index_copy(-1, index, values_MR.to(output.dtype)[None])

    return hook
