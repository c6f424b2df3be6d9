"""From examples to rows: what is held out, dropped, packed, and where the loss is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from invariants.micro import byte_tokenizer, write_examples

from ssmtune.errors import ConfigError, DataError
from ssmtune.training_data import DataConfig, prepare_data


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples") / "train.jsonl", num=30)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def documents(rows: Any) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every document in packed rows."""
    found = []
    for row in rows:
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            found.append((row["input_ids"][part], row["labels"][part]))
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"])
    return found


@pytest.mark.parametrize("config", [{}, {"task": "classification", "train_file": "x.jsonl"}], ids=["neither", "both"])
def test_exactly_one_source(config: dict[str, str], tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="give exactly one of the two"):
        prepare_data(DataConfig(**config), tokenizer)


def test_packing_keeps_every_document_whole(examples: Path, tokenizer: Any) -> None:
    common = {"train_file": str(examples), "max_length": 128}
    packed = prepare_data(DataConfig(**common), tokenizer)
    single = prepare_data(DataConfig(**common, packing=False), tokenizer)
    assert len(packed.train) < len(single.train)
    assert max(len(row) for row in packed.train["input_ids"]) <= 128
    assert sorted(documents(packed.train)) == sorted(documents(single.train))
    assert packed.summary["tokens"] == single.summary["tokens"]


def test_loss_is_taken_on_the_answer_and_its_end(examples: Path, tokenizer: Any) -> None:
    data = prepare_data(DataConfig(train_file=str(examples), packing=False), tokenizer)
    written = {(row["instruction"], row["output"]) for row in map(json.loads, examples.read_text().splitlines())}
    found = set()
    for tokens, labels in documents([*data.train, *data.validation]):
        answer = [label for label in labels if label != -100]
        assert answer == tokens[-len(answer) :]
        prompt = tokenizer.decode(tokens[: -len(answer)], skip_special_tokens=False)
        text = tokenizer.decode(answer, skip_special_tokens=False)
        assert text.endswith("<|end_of_text|>") and prompt.endswith("<|start_of_role|>assistant<|end_of_role|>")
        asked = prompt.split("<|end_of_role|>")[1].removesuffix("<|end_of_text|><|start_of_role|>assistant")
        found.add((asked, text.removesuffix("<|end_of_text|>")))
    assert found == written


def test_validation_is_held_out_of_training(examples: Path, tokenizer: Any) -> None:
    data = prepare_data(DataConfig(train_file=str(examples), validation_share=0.2, packing=False), tokenizer)
    assert data.summary["examples"] == {"train": 24, "validation": 6}
    assert (len(data.train), len(data.validation)) == (24, 6)


def test_validation_file_leaves_training_whole(examples: Path, tokenizer: Any, tmp_path: Path) -> None:
    other = write_examples(tmp_path / "validation.jsonl", num=3, seed=9)
    data = prepare_data(DataConfig(train_file=str(examples), validation_file=str(other)), tokenizer)
    assert data.summary["examples"] == {"train": 30, "validation": 3}


def test_overlong_examples_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = write_examples(tmp_path / "train.jsonl", num=20)
    long = json.dumps({"instruction": "x" * 500, "output": "y"})
    path.write_text(path.read_text() + "\n".join([long] * 3) + "\n")
    data = prepare_data(DataConfig(train_file=str(path), max_length=100, packing=False), tokenizer)
    assert len(data.messages) == 1
    assert data.messages[0].startswith("3 of 22 train examples are longer than 100 tokens")
    assert len(data.train) == 19
    assert data.summary["dropped"] == data.messages


def test_nothing_left_is_an_error(examples: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="max_length"):
        prepare_data(DataConfig(train_file=str(examples), max_length=8), tokenizer)


def test_single_example_cannot_be_split(tmp_path: Path, tokenizer: Any) -> None:
    path = write_examples(tmp_path / "one.jsonl", num=1)
    with pytest.raises(DataError, match="no train example is left"):
        prepare_data(DataConfig(train_file=str(path)), tokenizer)


def test_equal_configs_give_equal_rows(examples: Path, tokenizer: Any) -> None:
    first, second = (prepare_data(DataConfig(train_file=str(examples)), tokenizer) for _ in range(2))
    assert first.train.to_dict() == second.train.to_dict()


def test_pad_token_falls_back_to_the_end_token(examples: Path) -> None:
    tokenizer = byte_tokenizer()
    assert prepare_data(DataConfig(train_file=str(examples)), tokenizer).pad_token_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert prepare_data(DataConfig(train_file=str(examples)), tokenizer).pad_token_id == tokenizer.eos_token_id
