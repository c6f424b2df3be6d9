"""Merging a matrix some rows at a time: what is read, changed, counted and written stays in a processor's cache.

Dimensions: O outputs and I inputs of the matrix, r rank, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer

from ssmtune.attach import AdaptedModel
from ssmtune.base_stream import MergedWeights
from ssmtune.methods._low_rank import decomposed
from ssmtune.peft_layers import module_name
from ssmtune.restore import give_back
from ssmtune.rounding import BLOCK, Tally
from ssmtune.weight_units import Unit

PART = 1 << 22
"""Elements of a matrix, about, that a thread reads and writes at once: enough that calls cost nothing beside the data."""


@dataclass(frozen=True, kw_only=True)
class LowRankRows:
    """PEFT's change of a whole matrix, for some of its rows: W + s B A, with rows of the norms m where it has them."""

    A_rI: torch.Tensor
    B_Or: torch.Tensor
    scale: float
    magnitude_O1: torch.Tensor | None

    def apply(self, value_NI: torch.Tensor, first: int) -> torch.Tensor:
        """Return the effective rows from `first` on, of the base's rows in fp32, which are not changed."""
        rows = slice(first, first + len(value_NI))
        sum_NI = torch.addmm(value_NI, self.B_Or[rows], self.A_rI, alpha=self.scale)
        return sum_NI if self.magnitude_O1 is None else decomposed(sum_NI, self.magnitude_O1[rows])


def low_rank_rows(layer: LoraLayer) -> LowRankRows | None:
    """Return the change that a layer makes to a matrix, or None where it makes another kind."""
    if type(layer) is not Linear or layer.fan_in_fan_out:
        return None
    magnitude = layer.lora_magnitude_vector["default"].weight if layer.lora_magnitude_vector else None
    return LowRankRows(
        A_rI=layer.lora_A["default"].weight.detach().float(),
        B_Or=layer.lora_B["default"].weight.detach().float(),
        scale=layer.scaling["default"],
        magnitude_O1=None if magnitude is None else magnitude.detach()[:, None],
    )


def lora_layer(adapted: AdaptedModel, path: str, module: str) -> Any:
    """Return PEFT's layer for a site: around the module, or, for packed experts, the one of a chain that holds this tensor."""
    model = adapted.base_model.model
    if path.endswith(".weight"):
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        return layer
    parent, _, name = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    while isinstance(owner, LoraLayer):
        if getattr(owner, "parameter_name", None) == name:
            return owner
        owner = owner.base_layer
    raise AssertionError(f"no LoRA layer holds {path}")


def change_by_rows(adapted: AdaptedModel, unit: Unit, paths: Mapping[str, str]) -> LowRankRows | None:
    """Return the change of a unit that is one matrix with one low-rank layer around it, else None: then all of it is needed."""
    sites = [site for site in adapted.plan.sites if site.path in paths.values()]
    if unit.converter is not None or len(sites) != 1 or sites[0].container != "module":
        return None
    return low_rank_rows(lora_layer(adapted, sites[0].path, module_name(sites[0])))


def row_blocks(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of blocks of rows that stay in a processor's cache."""
    step = max(1, BLOCK // max(1, width))
    for first in range(0, num_rows, step):
        yield first, min(first + step, num_rows)


def effective_matrix(change: LowRankRows, base_OI: torch.Tensor) -> torch.Tensor:
    """Return the whole matrix with a change, [O, I] fp32: the same bits as `RowMerge` makes."""
    value_OI = torch.empty(base_OI.shape, dtype=torch.float32, device=base_OI.device)
    with _one_thread():
        for first, end in row_blocks(*base_OI.shape):
            value_OI[first:end] = change.apply(base_OI[first:end].float(), first)
    return value_OI


@dataclass(frozen=True, kw_only=True)
class RowMerge:
    """One matrix of the base on its way into the merged files; `restored` rows stay the base's."""

    unit: Unit
    change: LowRankRows
    restored: Sequence[tuple[int, int]]
    output: MergedWeights

    def parts(self) -> list[tuple[int, int]]:
        """Return (first, end) of the rows that one thread does at a time, made of whole blocks."""
        blocks = list(row_blocks(*self.output.shape_of(self.unit)))
        num = max(1, PART // BLOCK)
        groups = [blocks[i : i + num] for i in range(0, len(blocks), num)]
        return [(group[0][0], group[-1][1]) for group in groups]

    def run(self, part: tuple[int, int]) -> Tally:
        """Merge and write the rows of one part; return what was counted."""
        tally, (start, end) = Tally(), part
        base_NI = self.output.base_rows(self.unit, start, end)
        stored_NI = torch.empty(base_NI.shape, dtype=self.output.dtypes[self.unit.names[0]])
        for first, last in row_blocks(*base_NI.shape):
            base, stored = base_NI[first:last], stored_NI[first:last]
            exact = self.change.apply(base.float(), start + first)
            bounds = [(max(a - start, first), min(b - start, last)) for a, b in self.restored]
            give_back(exact, base, [(a - first, b - first) for a, b in bounds if a < b])
            tally.add(base, exact, stored.copy_(exact))
        self.output.put_rows(self.unit, start, stored_NI)
        return tally


def await_copies(copies: Sequence[Future[None]]) -> dict[str, Tally]:
    """Wait for the parts of a copy, of which nothing is counted."""
    for copy in copies:
        copy.result()
    return {}


def await_rows(name: str, parts: Sequence[Future[Tally]]) -> dict[str, Tally]:
    """Wait for the parts of the tensor `name`; return what was counted of all of it."""
    whole = Tally()
    for part in parts:
        whole.merge(part.result())
    return {name: whole}


@contextmanager
def single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, but two at least, since one may wait for the disk; in each of them torch computes alone.

    What still waits is dropped when the block fails.
    """
    num = max(2, torch.get_num_threads())
    with _one_thread():
        pool = ThreadPoolExecutor(num, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
