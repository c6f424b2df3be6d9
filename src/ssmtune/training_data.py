"""Training data: a task or the user's files, tokenised and packed into rows of whole documents."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from ssmtune.cache import cached_directory
from ssmtune.config import STRICT
from ssmtune.data import PromptCompletion, load_pairs, tokenize
from ssmtune.errors import ConfigError, DataError
from ssmtune.records import digest, file_sha256, write_json
from ssmtune.tasks.base import Example, GeneratedTask, Side, SidedTask, get_task, messages, split

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """A task by name, or JSONL files of your own.

    `directory` is where the sets of tasks lie, or "hub" to download the one that is named; None for SSMTUNE_DATA.
    `validation_share` of the training side selects the best checkpoint; the task's test side is never seen here.
    `packing` puts several documents into one row of at most `max_length` tokens and keeps them apart.
    """

    task: str | None = None
    size: float = pydantic.Field(default=1.0, gt=0, le=1)
    directory: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    validation_share: float = pydantic.Field(default=0.05, gt=0, lt=1)
    max_length: int = pydantic.Field(default=1024, ge=8)
    packing: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Packed rows to train on and to validate on: `input_ids`, `labels`, `seq_lengths`."""

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    summary: dict[str, Any]
    messages: list[str]


def prepare_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Return the data of `config`, tokenised with the chat template and packed.

    Raises `ConfigError` when neither or both of `task` and `train_file` are given, `DataError` for bad lines or when
    nothing is left after the length limit.
    """
    from datasets import disable_progress_bars

    if (config.task is None) == (config.train_file is None):
        raise ConfigError(
            f"data: got task={config.task!r} and train_file={config.train_file!r}; give exactly one of the two."
        )
    # Tokenising and packing take seconds; a bar per step would hide the messages that matter.
    disable_progress_bars()
    if config.task is not None:
        # A task's rows are a function of its version, its files, the settings and the tokenizer, so they can be kept.
        task = get_task(config.task)
        sources = task_sources(config.task, "train", config.directory)
        settings = {name: value for name, value in asdict(config).items() if name != "directory"}
        key = ["rows", task.name, task.version, sources, settings, tokenizer_digest(tokenizer)]
        directory = cached_directory(key, lambda path: _save_rows(_make_rows(config, tokenizer), path))
        rows = _load_rows(directory)
    else:
        rows = _make_rows(config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return TrainingData(
        train=rows.parts["train"],
        validation=rows.parts["validation"],
        tokenizer=tokenizer,
        pad_token_id=int(pad),
        summary=rows.summary,
        messages=rows.summary["dropped"],
    )


@dataclass(frozen=True, kw_only=True)
class _Rows:
    parts: dict[str, datasets.Dataset]
    summary: dict[str, Any]


def _make_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> _Rows:
    if config.task is not None:
        pairs = [as_pair(example) for example in task_side(config.task, "train", config.size, config.directory)]
    else:
        assert config.train_file is not None
        pairs = load_pairs(config.train_file)
    if config.validation_file is not None:
        held_out = load_pairs(config.validation_file)
    else:
        num_held_out = max(1, round(config.validation_share * len(pairs)))
        held_out, pairs = pairs[:num_held_out], pairs[num_held_out:]
    notes: list[str] = []
    parts = {}
    for name, members in (("train", pairs), ("validation", held_out)):
        if not members:
            raise DataError(f"no {name} example is left after the split. Give more examples.")
        tokenized = tokenize(members, tokenizer, config.max_length, overlong="drop")
        if tokenized.num_dropped:
            notes.append(
                f"{tokenized.num_dropped} of {len(members)} {name} examples are longer than {config.max_length} tokens "
                "and are left out (data.max_length)."
            )
        if len(tokenized.dataset) == 0:
            raise DataError(f"no {name} example is left within data.max_length={config.max_length} tokens. Raise it.")
        parts[name] = _pack(tokenized.dataset, config)
    summary = {
        "sources": {} if config.task is None else task_sources(config.task, "train", config.directory),
        "examples": {"train": len(pairs), "validation": len(held_out)},
        "rows": {name: len(part) for name, part in parts.items()},
        "tokens": {name: sum(map(len, part["input_ids"])) for name, part in parts.items()},
        "dropped": notes,
    }
    return _Rows(parts=parts, summary=summary)


def _save_rows(rows: _Rows, directory: Path) -> None:
    for name, part in rows.parts.items():
        part.save_to_disk(str(directory / name))
    write_json(directory / "summary.json", rows.summary)


def _load_rows(directory: Path) -> _Rows:
    from datasets import load_from_disk

    parts = {name: load_from_disk(str(directory / name)) for name in ("train", "validation")}
    return _Rows(parts=parts, summary=json.loads((directory / "summary.json").read_text(encoding="utf-8")))


def task_side(name: str, side: Side, size: float, directory: str | None = None) -> list[Example]:
    """Return the examples of one side of a task: to train on, or held out. Each prefix is a fair sample.

    `size` scales both sides of a generated task, and the training side alone of the others.
    Raises `DataError` for a set that is not there, or a side that it does not have.
    """
    task = get_task(name)
    if isinstance(task, SidedTask):
        return list(task.examples(side, size, directory))
    parts = split(task_examples(name, size))
    return parts.train if side == "train" else parts.test


def task_sources(name: str, side: Side, directory: str | None = None) -> dict[str, str]:
    """Return digests of what one side of a task is made from: its files, or the catalogue of a generated one."""
    task = get_task(name)
    if isinstance(task, SidedTask):
        return task.sources(side, directory)
    return {"catalogue": catalogue_digest()}


def task_examples(name: str, size: float) -> list[Example]:
    """Return a generated task's examples, from the cache where they were generated before."""
    task = get_task(name)
    assert isinstance(task, GeneratedTask)

    def make(directory: Path) -> None:
        write_json(directory / "examples.json.gz", [asdict(example) for example in task.generate(size, 0)])

    directory = cached_directory(["examples", task.name, task.version, catalogue_digest(), size], make)
    rows = json.loads(gzip.decompress((directory / "examples.json.gz").read_bytes()))
    return [Example(**row) for row in rows]


def catalogue_digest() -> str:
    """Digest of the schema catalogue that the tasks are generated from."""
    return file_sha256(str(resources.files("ssmtune") / "assets" / "catalogue.json.gz"))[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what decides a tokenisation: vocabulary, merges and chat template."""
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template])


def as_pair(example: Example) -> PromptCompletion:
    """A task's example as the messages that train on it."""
    prompt, completion = messages(example)
    return PromptCompletion(prompt=prompt, completion=completion)


def _pack(dataset: datasets.Dataset, config: DataConfig) -> datasets.Dataset:
    """Rows with `labels` (loss on completions only) and `seq_lengths`; documents are never cut."""
    from trl import pack_dataset

    labelled = dataset.map(
        lambda batch: {
            "labels": [
                [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
                for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
            ]
        },
        batched=True,
        remove_columns=[name for name in dataset.column_names if name != "input_ids"],
    )
    if not config.packing:
        return labelled.map(lambda batch: {"seq_lengths": [[len(ids)] for ids in batch["input_ids"]]}, batched=True)
    return pack_dataset(labelled, config.max_length, strategy="bfd")
