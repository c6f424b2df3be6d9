"""What a benchmark's step computes on: rows of random tokens, or short documents, which we pack and the peer pads."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssmtune.packing import PackedCollator

if TYPE_CHECKING:
    from ssmtune.bench import BenchConfig, Side

SPREAD = 0.8
"""Standard deviation of the logarithm of a document's length: one in twenty is longer than 2.7 times the mean."""

SHORTEST = 2
"""A document of one token has nothing to predict."""

PEER_ROWS = 8
"""Documents that the peer pads to one length: the batch size that transformers' trainer starts with; it accumulates those."""

ROW_MULTIPLE = 64
"""Rows of packed documents are padded to a multiple of it, as in training."""

Batch = dict[str, Any]


def make_batches(config: BenchConfig, side: Side, vocab_size: int) -> list[Batch]:
    """Return the batches that one step of a side accumulates, the same documents on both, on the config's device.

    Each has `num_tokens`, those that are no padding, `num_documents`, and `share`, its part of the step's targets.
    Ours has `input_ids` and `position_ids` [B, T], `loss_positions` and `targets` [n]; the peer's has what a model of
    transformers takes: `input_ids`, `labels` and, where rows are padded, `attention_mask`, each int64 [B, T].
    """
    generator = torch.Generator().manual_seed(1)
    if config.documents is None:
        rows = config.tokens_per_step // config.row_length
        tokens_BT = torch.randint(vocab_size, (rows, config.row_length), generator=generator)
        facts = {"num_tokens": tokens_BT.numel(), "num_documents": rows, "share": 1.0}
        whole = {"input_ids": tokens_BT, "labels": tokens_BT, **facts}
        batches = [_packed([[row] for row in tokens_BT], 1) if side == "ssmtune" else whole]
    else:
        lengths = document_lengths(config.documents, config.tokens_per_step, config.row_length)
        documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
        if side == "ssmtune":
            batches = [_packed(pack(documents, config.row_length), ROW_MULTIPLE)]
        else:
            batches = _padded(documents)
    return [
        {name: value.to(config.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        for batch in batches
    ]


def document_lengths(mean: int, tokens_per_step: int, row_length: int) -> list[int]:
    """Return lengths of documents, log-normal around `mean`, the same at every call: as many as fill the step's rows.

    None is longer than a row. They are packed as training packs, and the last are left out until all rows suffice.
    """
    generator = np.random.default_rng(0)
    drawn = generator.lognormal(math.log(mean) - SPREAD**2 / 2, SPREAD, size=2 * tokens_per_step // mean + 16)
    lengths = [int(length) for length in drawn.round().clip(SHORTEST, row_length)]
    num = max(1, sum(total <= tokens_per_step for total in accumulate(lengths)))
    rows = tokens_per_step // row_length
    while len(pack([torch.zeros(n, dtype=torch.long) for n in lengths[:num]], row_length)) > rows:
        num -= 1
    return lengths[:num]


def pack(documents: list[torch.Tensor], row_length: int) -> list[list[torch.Tensor]]:
    """Return the documents of each row, as `training_data` packs them: whole, at most `row_length` tokens together."""
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    columns = {"input_ids": [document.tolist() for document in documents]}
    rows = pack_dataset(datasets.Dataset.from_dict(columns), row_length, strategy="bfd")
    return [list(torch.split(torch.tensor(row["input_ids"]), row["seq_lengths"])) for row in rows]


def _packed(rows: list[list[torch.Tensor]], multiple_of: int) -> Batch:
    """One batch of rows of documents, through the collator that training uses."""
    collate = PackedCollator(pad_token_id=0, multiple_of=multiple_of)
    batch = collate(
        [
            {"input_ids": torch.cat(row), "labels": torch.cat(row), "seq_lengths": [len(document) for document in row]}
            for row in rows
        ]
    )
    names = ("input_ids", "position_ids", "loss_positions", "targets", "num_tokens", "is_packed")
    facts = {"num_documents": sum(map(len, rows)), "share": 1.0}
    return {**{name: batch[name] for name in names}, **facts}


def _padded(documents: list[torch.Tensor]) -> list[Batch]:
    """Batches of at most `PEER_ROWS` documents, in their order, each padded on the right to its longest."""
    num_targets = sum(len(document) - 1 for document in documents)
    batches = []
    for first in range(0, len(documents), PEER_ROWS):
        members = documents[first : first + PEER_ROWS]
        input_ids, mask, labels = (
            torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
            for values, padding in ((members, 0), ([torch.ones_like(d) for d in members], 0), (members, -100))
        )
        num_tokens, num = int(mask.sum()), len(members)
        facts = {"num_tokens": num_tokens, "num_documents": num, "share": (num_tokens - num) / num_targets}
        batches.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels, **facts})
    return batches
