"""Packing: several documents in one row, told apart by position ids that restart at each document."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def segment_index(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the document's number at each position, int32 [B, T], counted from 0 in each row.

    A document starts wherever `position_ids` [B, T] does not go up by exactly one.
    """
    import torch

    starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return starts.cumsum(-1).to(torch.int32)


def mark_documents(seq_idx: torch.Tensor) -> torch.Tensor:
    """Return a padding mask [B, T] without padding that stands for `seq_idx` [B, T] wherever it is handed on as it is.

    Several models give their recurrent layers the mask and nothing else; `documents_of` finds the documents again.
    """
    import torch

    mask = torch.ones_like(seq_idx, dtype=torch.long)
    mark_as(mask, seq_idx)
    return mask


def mark_as(mask: torch.Tensor, seq_idx: torch.Tensor) -> None:
    """Let a mask [B, T] stand for `seq_idx` [B, T]."""
    _documents()[mask] = seq_idx


def documents_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return the `seq_idx` that `mark_documents` made this very mask for, or None."""
    return None if mask is None else _documents().get(mask)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is given of a batch of `PackedCollator`.

    Positions only where there are documents to keep apart: finding none in them means waiting for the GPU.
    """
    names = ("input_ids", "position_ids") if batch["is_packed"] else ("input_ids",)
    return {name: batch[name] for name in names}


@lru_cache
def _documents() -> MutableMapping[torch.Tensor, torch.Tensor]:
    """Mask -> documents, by identity, for as long as the mask lives; gradient checkpointing keeps it until backward."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class PackedCollator:
    """Rows of packed documents -> a batch whose documents stay apart in attention and state.

    Each row holds `input_ids`, `labels` (or `completion_mask`) and `seq_lengths`. Rows are padded on the right to
    the longest, rounded up to `multiple_of`; the padding counts as a document of its own, so no mask is needed.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return input_ids, labels (-100 where no loss is taken) and position_ids, each int64 [B, T]; and

        `loss_positions` int64 [n]: flat positions whose next token is a target; `targets` int64 [n]: those tokens;
        `num_tokens`: tokens that are not padding; `is_packed`: whether any row holds more than one whole document.
        """
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        width += -width % self.multiple_of
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        labels = torch.full(shape, -100, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.as_tensor(row["input_ids"])
            labels[index, :length] = torch.as_tensor(row["labels"])
            lengths = [*row["seq_lengths"], width - length]
            position_ids[index] = torch.cat([torch.arange(n) for n in lengths])
        # The first token of a document is predicted from the last token of the one before: never a target.
        labels[position_ids == 0] = -100
        target_positions = (labels.flatten() != -100).nonzero().squeeze(1)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "loss_positions": target_positions - 1,
            "targets": labels.flatten()[target_positions],
            "num_tokens": sum(len(row["input_ids"]) for row in rows),
            "is_packed": any(list(row["seq_lengths"]) != [width] for row in rows),
        }
