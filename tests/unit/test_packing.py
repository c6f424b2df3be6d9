"""Rows of several documents: numbering, labels, and that packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssmtune.packing import PackedCollator, segment_index


def test_segments_start_where_positions_do_not_go_up_by_one() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1, 0], [5, 6, 7, 8, 0, 1, 2]])
    assert segment_index(position_ids).tolist() == [[0, 0, 0, 1, 2, 2, 3], [0, 0, 0, 0, 1, 1, 1]]
    assert segment_index(position_ids).dtype == torch.int32


rows_of_documents = st.lists(
    st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=5), min_size=1, max_size=4
)


@given(rows=rows_of_documents, multiple_of=st.sampled_from([1, 8, 64]))
def test_batch_holds_every_document_once_and_its_targets(rows: list[list[list[int]]], multiple_of: int) -> None:
    """Documents, targets and their contexts can be read back; the padding belongs to none of them."""
    packed = []
    for documents in rows:
        ids = [token for document in documents for token in document]
        # Even tokens are completions: any pattern of labels must survive.
        labels = [token if token % 2 == 0 else -100 for token in ids]
        packed.append({"input_ids": ids, "labels": labels, "seq_lengths": [len(d) for d in documents]})
    batch = PackedCollator(pad_token_id=0, multiple_of=multiple_of)(packed)
    assert batch["input_ids"].shape[1] % multiple_of == 0
    assert batch["num_tokens"] == sum(len(row["input_ids"]) for row in packed)
    segments = segment_index(batch["position_ids"])
    # What a trainer reads instead of the positions.
    assert batch["is_packed"] == bool((segments != 0).any())
    expected = []
    for index, documents in enumerate(rows):
        for number, document in enumerate(documents):
            inside = segments[index] == number
            assert batch["input_ids"][index, inside].tolist() == document
            assert batch["position_ids"][index, inside].tolist() == list(range(len(document)))
            expected += [(document[t - 1], document[t]) for t in range(1, len(document)) if document[t] % 2 == 0]
    flat = batch["input_ids"].flatten()
    found = [
        (int(flat[position]), int(target))
        for position, target in zip(batch["loss_positions"], batch["targets"], strict=True)
    ]
    assert found == expected
    assert int((batch["labels"] != -100).sum()) == len(expected)


def test_first_token_of_a_document_is_no_target() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [2, 2]}
    batch = PackedCollator(pad_token_id=0)([row])
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]]
    assert batch["loss_positions"].tolist() == [0, 2] and batch["targets"].tolist() == [6, 8]


def test_padding_is_a_document_of_its_own() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [3]},
        {"input_ids": [5], "labels": [5], "seq_lengths": [1]},
    ]
    batch = PackedCollator(pad_token_id=9, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100] * 4]


def test_lengths_that_contradict_the_row_are_refused() -> None:
    with pytest.raises(RuntimeError):
        PackedCollator(pad_token_id=0)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2]}])
