"""Where the examples of the catalogue come from: directories, a hub, a rule; and what is said when they are missing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmtune import evaluate as evaluating
from ssmtune.errors import ConfigError, DataError, SsmtuneError
from ssmtune.evaluate import EvaluateConfig, evaluate, pick_shots
from ssmtune.models import load_tokenizer
from ssmtune.study_cells import StudyConfig, expand
from ssmtune.study_runs import study_inputs
from ssmtune.tasks import dfa, needle, parity
from ssmtune.tasks._outcomes import by_variation
from ssmtune.tasks._pixels import as_text
from ssmtune.tasks._sequences import SequenceTask
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks.base import get_task, messages, sample_examples, task_names, with_shots
from ssmtune.training_data import DataConfig, prepare_data, task_side, task_sources

SOURCED = [task for name in task_names() if isinstance(task := get_task(name), SourcedTask)]
SEQUENCES = [task for name in task_names() if isinstance(task := get_task(name), SequenceTask)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines, compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def reviews(num: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"id": f"r{i}", "input": f"film number {i}", "target": ("positive", "negative")[i % 2]}
        for i in range(start, start + num)
    ]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a small set for `sentiment`."""
    write_rows(tmp_path / "tasks" / "sentiment" / "train.jsonl.gz", reviews(40))
    write_rows(tmp_path / "tasks" / "sentiment" / "test.jsonl.gz", reviews(6, 100))
    return tmp_path


# Directories


def test_both_sides_are_read_in_a_fixed_random_order(directory: Path) -> None:
    train, test = (task_side("sentiment", side, 1.0, str(directory)) for side in ("train", "test"))
    ids = [example.id for example in train]
    in_file = [f"r{i}" for i in range(40)]
    assert sorted(ids) == sorted(in_file) and ids != in_file
    assert [e.id for e in task_side("sentiment", "train", 0.25, str(directory))] == ids[:10]
    assert len(task_side("sentiment", "test", 0.25, str(directory))) == len(test) == 6
    assert messages(test[0])[0][0]["content"].endswith(test[0].input)
    assert set(task_sources("sentiment", "train", str(directory))) == {"sentiment/train.jsonl.gz"}


@pytest.mark.parametrize("name", ["tasks/sentiment/train.jsonl", "sentiment/train.jsonl.gz", "sentiment/train.jsonl"])
def test_either_layout_is_found(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, reviews(2))
    assert len(task_side("sentiment", "train", 1.0, str(tmp_path))) == 2
    task = get_task("sentiment")
    assert isinstance(task, SourcedTask) and task.found_splits(str(tmp_path)) == ["train"]


def test_the_environment_names_the_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMTUNE_DATA", str(directory))
    assert len(task_side("sentiment", "test", 1.0)) == 6
    with pytest.raises(DataError, match="elsewhere holds no split 'test'"):
        task_side("sentiment", "test", 1.0, "elsewhere")


@pytest.mark.parametrize("task", SOURCED, ids=lambda task: task.name)
def test_a_missing_set_says_how_to_get_it(task: SourcedTask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SSMTUNE_DATA", raising=False)
    side = "test" if task.tested else "train"
    for given, words in ((None, "no data directory is given"), (str(tmp_path), f"{tmp_path} holds no split")):
        with pytest.raises(DataError) as raised:
            task.examples(side, 1.0, given)  # type: ignore[arg-type]
        text = str(raised.value)
        assert words in text and task.folder in text and "SSMTUNE_DATA" in text and task.licence in text
        assert task.hub is None or task.hub.path in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "input": "x"}, "line 1: field 'target': got None; expected a string"),
        ({"id": 3, "input": "x", "target": "y"}, "line 1: field 'id': got 3"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "sentiment" / "train.jsonl", [row])
    with pytest.raises(DataError, match=message):
        task_side("sentiment", "train", 1.0, str(tmp_path))


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "sentiment" / "train.jsonl", [])
    with pytest.raises(DataError, match="is empty"):
        task_side("sentiment", "train", 1.0, str(tmp_path))


@pytest.mark.parametrize(("name", "side"), [("humaneval", "train"), ("text_to_sql", "train"), ("ultrachat", "test")])
def test_a_side_that_a_task_has_not_is_refused(name: str, side: Any) -> None:
    with pytest.raises(DataError, match=f"task '{name}': has no {'training' if side == 'train' else 'test'} side"):
        task_side(name, side, 1.0, ".")


def test_qmsum_puts_the_transcript_before_the_question(tmp_path: Path) -> None:
    row = {"id": "q", "input": "What next?", "target": "Lunch.", "context_id": "m1", "kind": "general"}
    write_rows(tmp_path / "qmsum" / "test.jsonl", [row])
    with pytest.raises(DataError, match="holds no split 'test'"):
        task_side("qmsum", "test", 1.0, str(tmp_path))
    write_rows(tmp_path / "qmsum" / "meetings.jsonl", [{"context_id": "m1", "turns": ["A: Hm.", "B: Lunch."]}])
    (example,) = task_side("qmsum", "test", 1.0, str(tmp_path))
    assert example.input == "A: Hm.\nB: Lunch.\n\nQuestion: What next?" and example.variation == "general"
    write_rows(tmp_path / "qmsum" / "meetings.jsonl", [{"context_id": "m2", "turns": []}])
    with pytest.raises(DataError, match="no meeting 'm1'"):
        task_side("qmsum", "test", 1.0, str(tmp_path))


def test_text_to_sql_reads_its_databases(tmp_path: Path) -> None:
    row = {"id": "q", "input": "How many?", "target": "select count(*) from t;", "db": "tiny", "category": "count"}
    write_rows(tmp_path / "text2sql_defog" / "test.jsonl", [row])
    with pytest.raises(DataError, match=r"field 'db': got 'tiny'.*Put the script"):
        task_side("text_to_sql", "test", 1.0, str(tmp_path))
    databases = tmp_path / "text2sql_defog" / "databases"
    databases.mkdir()
    (databases / "tiny.sql").write_text("create table t (a); insert into t values (1), (2);")
    (example,) = task_side("text_to_sql", "test", 1.0, str(tmp_path))
    assert get_task("text_to_sql").score("select 2", example) == {"execution": 1.0, "valid": 1.0}
    assert get_task("text_to_sql").score("select 1", example) == {"execution": 0.0, "valid": 1.0}


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    task = get_task("ultrachat")
    assert isinstance(task, SourcedTask)
    prompt, answer = messages(task.sample_examples()[0])
    assert [m["role"] for m in prompt] == ["user", "assistant", "user"] and answer[0]["role"] == "assistant"


# Images


def test_pixels_are_averaged_in_blocks_and_read_row_by_row() -> None:
    image = np.array([[0, 0, 255, 255], [0, 0, 255, 255], [16, 48, 200, 200], [16, 48, 200, 200]], dtype=np.uint8)
    assert as_text(image, 2) == "0f\n2c"
    coloured = np.stack([image, np.zeros_like(image), 255 - image], axis=-1)
    assert as_text(coloured, 2) == "00f f00\n20d c03"
    assert as_text(np.zeros((5, 7), dtype=np.uint8), 2) == "000\n000"


def test_image_sets_are_read_from_arrays(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    arrays = {
        "x_test": np.full((2, 28, 28), 160, np.uint8),
        "y_test": np.array([3, 0]),
        "labels": np.array(list("0123")),
    }
    path = tmp_path / "images" / "mnist_tiny.npz"
    np.savez(path, **arrays)
    examples = task_side("mnist", "test", 1.0, str(tmp_path))
    assert {example.output for example in examples} == {"3", "0"}
    assert examples[0].input == "\n".join(["a" * 14] * 14)
    with pytest.raises(DataError, match="holds no split 'train'"):
        task_side("mnist", "train", 1.0, str(tmp_path))
    np.savez(path, **{**arrays, "x_test": np.zeros((2, 28), np.float32)})
    with pytest.raises(DataError, match=r"x_test is float32 \(2, 28\) beside 2 labels"):
        task_side("mnist", "test", 1.0, str(tmp_path))


# A hub

Rows = list[dict[str, Any]]

PAIR = {"sentence1": "a", "sentence2": "b"}
TEXT = {"target": "t", "references": ["t", "u"]}
IMAGE = np.zeros((40, 40, 3), np.uint8)

CARDS: dict[str, tuple[dict[str, Any], list[str] | None, dict[str, str]]] = {
    "cola": ({"sentence": "s", "label": 1}, ["unacceptable", "acceptable"], {"input": "s", "target": "acceptable"}),
    "sst2": ({"sentence": "s", "label": 0}, ["negative", "positive"], {"input": "s", "target": "negative"}),
    "mrpc": (
        {**PAIR, "label": 1},
        ["not_equivalent", "equivalent"],
        {"input": "first: a\nsecond: b", "target": "yes"},
    ),
    "qqp": (
        {"question1": "a", "question2": "b", "label": 0},
        ["not_duplicate", "duplicate"],
        {"input": "first: a\nsecond: b", "target": "no"},
    ),
    "mnli": (
        {"premise": "a", "hypothesis": "b", "label": 2},
        ["entailment", "neutral", "contradiction"],
        {"input": "premise: a\nhypothesis: b", "target": "contradiction"},
    ),
    "qnli": (
        {"question": "a", "sentence": "b", "label": 0},
        ["entailment", "not_entailment"],
        {"input": "question: a\nsentence: b", "target": "yes"},
    ),
    "rte": ({**PAIR, "label": 1}, ["entailment", "not_entailment"], {"input": "text: a\nsentence: b", "target": "no"}),
    "wnli": ({**PAIR, "label": 1}, ["not_entailment", "entailment"], {"input": "first: a\nsecond: b", "target": "yes"}),
    "stsb": ({**PAIR, "label": 3.8}, None, {"input": "first: a\nsecond: b", "target": "3.8"}),
    "sentiment": ({"text": "s", "label": 1}, ["neg", "pos"], {"input": "s", "target": "positive"}),
    "clinc150": ({"text": "s", "intent": "oos"}, None, {"input": "s", "target": "oos"}),
    "dart": (
        {"tripleset": [["a", "r", "b"], ["b", "q", "c"]], **TEXT},
        None,
        {"input": "(a | r | b), (b | q | c)", "target": "t"},
    ),
    "e2e": (
        {"meaning_representation": "name[The Eagle], eatType[pub]", **TEXT},
        None,
        {"input": "name: The Eagle, eatType: pub", "target": "t"},
    ),
    "webnlg": (
        {"input": ["a | r | b", "b | q | c"], **TEXT},
        None,
        {"input": "(a | r | b), (b | q | c)", "target": "t"},
    ),
    "samsum": ({"dialogue": "d", "summary": "s"}, None, {"input": "d", "target": "s"}),
    "xsum": ({"document": "d", "summary": "s"}, None, {"input": "d", "target": "s"}),
    "spider": ({"question": "q", "db_id": "d", "query": "select 1"}, None, {"input": "q | d", "target": "select 1"}),
    "gsm8k": ({"question": "q", "answer": "x\n#### 1,000"}, None, {"input": "q", "target": "x\n#### 1,000"}),
    "asdiv": ({"body": "b.", "question": "q?", "answer": "9 (apples)"}, None, {"input": "b. q?", "target": "9 apples"}),
    "code_alpaca": ({"instruction": "i", "input": "x", "output": "o"}, None, {"input": "i\n\nx", "target": "o"}),
    "ultrachat": (
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        None,
        {"input": "a", "target": "b"},
    ),
    "humaneval": (
        {"task_id": "H/0", "prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "e"},
        None,
        {"input": "p", "target": "s"},
    ),
    "quality": (
        {"article": "a", "question": "q", "options": list("wxyz"), "answer": 2, "hard": True},
        None,
        {"input": "a\n\nQuestion: q\nA. w\nB. x\nC. y\nD. z", "target": "C"},
    ),
    "narrativeqa": (
        {"document": {"text": "d"}, "question": {"text": "q"}, "answers": [{"text": "t"}, {"text": "u"}]},
        None,
        {"input": "d\n\nQuestion: q", "target": "t"},
    ),
    "mnist": ({"image": IMAGE[:28, :28, 0], "label": 7}, list("0123456789"), {"target": "7"}),
    "cifar10": ({"img": IMAGE[:32, :32], "label": 1}, ["airplane", "automobile"], {"target": "automobile"}),
    "celeba": ({"image": IMAGE, "Smiling": True}, None, {"input": "\n".join(["000 000 000 000"] * 4), "target": "yes"}),
}
"""One row with the columns of each set's card, the names of its labels, and the row that it becomes."""


class _Hub:
    """Stands for a set that `datasets` fetched."""

    def __init__(self, rows: Rows, labels: list[str] | None) -> None:
        from datasets import ClassLabel

        self.rows = rows
        self.features = {"label": ClassLabel(names=labels)} if labels else {}

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return a function that sets what `load_dataset` gives and returns the list of its calls."""
    import datasets

    def serve(rows: Rows, labels: list[str] | None = None) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(*arguments: Any, **options: Any) -> _Hub:
            calls.append((arguments, options))
            return _Hub(rows, labels)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def test_every_set_on_a_hub_has_its_card_here() -> None:
    assert set(CARDS) == {task.name for task in SOURCED if task.hub is not None}


@pytest.mark.parametrize("name", CARDS)
def test_a_row_of_the_hub_becomes_one_of_ours(name: str, hub: Callable[..., list[Any]]) -> None:
    found, labels, expected = CARDS[name]
    task = get_task(name)
    assert isinstance(task, SourcedTask) and task.hub is not None
    calls = hub([found, found], labels)
    side = "test" if task.tested else "train"
    examples = task_side(name, side, 1.0, "hub")  # type: ignore[arg-type]
    assert len(examples) == 2 and examples[0].id
    assert {"input": examples[0].input, "target": examples[0].output} | expected == {
        "input": examples[0].input,
        "target": examples[0].output,
    }
    assert calls[0][0][0] == task.hub.path
    if task.metrics and not task.executes and name != "text_to_sql":
        assert task.score(examples[0].output, examples[0])[task.primary] == pytest.approx(1)


def test_a_set_with_other_columns_is_refused_with_what_it_has(hub: Callable[..., list[Any]]) -> None:
    hub([{"text": "s", "label": 1}], ["a", "b"])
    with pytest.raises(DataError, match=r"row 0 of nyu-mll/glue is not as expected \(KeyError\('sentence'\)\).*'text'"):
        task_side("cola", "test", 1.0, "hub")


def test_a_set_that_cannot_be_reached_is_an_error_and_no_traceback() -> None:
    with pytest.raises(DataError, match=r"nyu-mll/glue cannot be fetched .*give a directory"):
        task_side("cola", "test", 1.0, "hub")


def test_a_split_or_a_hub_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="EleutherAI/asdiv has no split for 'train'"):
        task_side("asdiv", "train", 1.0, "hub")
    with pytest.raises(DataError, match="'spam': is on no hub"):
        task_side("spam", "test", 1.0, "hub")


# Drawn sequences


@pytest.mark.parametrize("task", SEQUENCES, ids=lambda task: task.name)
def test_sequences_are_drawn_the_same_way_and_never_cross_the_sides(task: SequenceTask) -> None:
    train, test = task.examples("train", 0.02, None), task.examples("test", 0.02, None)
    assert train == task.examples("train", 0.02, None)
    assert train[: len(train) // 2] == task.examples("train", 0.01, None)
    assert not {e.input for e in train} & {e.input for e in test}
    lengths = Counter(e.variation for e in test)
    assert len(lengths) == len(task.test_lengths) and set(lengths.values()) == {task.num_test}
    assert max(task.test_lengths) > max(task.train_lengths)
    assert all(task.score(e.output, e) == {"exact": 1.0, "prefix": 1.0} for e in (train[0], test[-1]))
    assert len(train) == round(0.02 * task.num_train) and task.sources("train", None) == {}


def test_the_rules_are_right() -> None:
    for e in parity.TASK.examples("test", 1.0, None)[:20]:
        assert e.output == ("odd" if e.input.count("1") % 2 else "even")
    for e in dfa.TASK.examples("test", 1.0, None)[:20]:
        state = 0
        for letter in e.input.split():
            state = {"a": (state + 1) % 4, "b": {0: 1, 1: 0}.get(state, state), "c": state // 2 * 2}[letter]
        assert e.output == str(state)
    for e in needle.TASK.examples("test", 1.0, None)[:20]:
        asked = e.input.rpartition("code of ")[2].rstrip("?")
        assert f"The code of {asked} is {e.output}." in e.input and e.input.count("The code of") == 4


def test_an_avoided_question_is_drawn_again() -> None:
    """Planted: two bits have four questions, so that a side drawn without looking would repeat the other's."""
    first = parity.TASK._drawn("train", (2,), 8, frozenset())
    taken = frozenset(e.input for e in first[:1])
    again = parity.TASK._drawn("train", (2,), 8, taken)
    assert {e.input for e in first} & taken and not {e.input for e in again} & taken


# Training, evaluation and studies


def test_a_set_is_training_data(directory: Path) -> None:
    config = DataConfig(task="sentiment", directory=str(directory), max_length=128)
    data = prepare_data(config, load_tokenizer("tiny-granite-h"))
    assert data.summary["examples"] == {"train": 38, "validation": 2}
    assert set(data.summary["sources"]) == {"sentiment/train.jsonl.gz"}
    text = data.tokenizer.decode(data.train[0]["input_ids"])
    assert "film number" in text and "Is this sentence of a film review" in text


def test_changed_files_are_read_again(directory: Path) -> None:
    """Rows are kept by the files' digests: a set that changes below the same name is another one."""
    config = DataConfig(task="sentiment", directory=str(directory), max_length=128)
    tokenizer = load_tokenizer("tiny-granite-h")
    first = prepare_data(config, tokenizer)
    write_rows(directory / "tasks" / "sentiment" / "train.jsonl.gz", reviews(20, 500))
    assert prepare_data(config, tokenizer).summary["examples"] != first.summary["examples"]


def test_evaluation_of_a_set_records_what_a_reader_needs(directory: Path) -> None:
    config = EvaluateConfig(model="tiny-granite-h", task="sentiment", directory=str(directory), num_examples=4, shots=2)
    record = evaluate(config, progress=False)
    assert record["chance"] == 0.5 and record["commonest"] >= 0.5
    assert set(record["corpus_metrics"]) == {"readable", "f1"} and record["variations"] == {}
    assert set(record["sources"]) == {"sentiment/test.jsonl.gz"} and len(record["shots"]) == 2
    assert set(record["shots"]) <= {f"r{i}" for i in range(40)}
    assert len(record["scores"]["accuracy"]) == 4 and record["samples"][0]["prompt"].count("film number") == 1


def test_shots_are_solved_examples_of_the_training_side_before_the_question(directory: Path) -> None:
    config = EvaluateConfig(model="-", task="sentiment", directory=str(directory), shots=3)
    shots = pick_shots(config)
    assert shots == pick_shots(config) and len({shot.id for shot in shots}) == 3
    question = messages(task_side("sentiment", "test", 1.0, str(directory))[0])[0]
    prompt = with_shots(question, shots)
    assert [m["role"] for m in prompt] == ["user", "assistant"] * 3 + ["user"] and prompt[-1:] == question
    assert [m["content"] for m in prompt[1::2]] == [shot.output for shot in shots]
    with pytest.raises(ConfigError, match="--shots 21: task 'sentiment' has 20 examples"):
        pick_shots(EvaluateConfig(model="-", task="sentiment", directory=str(directory), shots=21))


def test_the_model_is_asked_with_the_shots(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> list[tuple[str, bool]]:
        asked.extend(prompts)
        return [("positive", True)] * len(prompts)

    monkeypatch.setattr(evaluating, "evaluation_model", lambda config: None)
    monkeypatch.setattr(evaluating, "answer", answer)
    config = EvaluateConfig(model="tiny-granite-h", task="sentiment", directory=str(directory), shots=2)
    record = evaluate(config, progress=False)
    shown = [shot.input for shot in pick_shots(config)]
    assert [len(prompt) for prompt in asked] == [5] * 6
    assert all(
        text in message["content"] for prompt in asked for text, message in zip(shown, prompt[::2], strict=False)
    )
    assert record["metrics"]["accuracy"] == record["commonest"] == 0.5
    assert record["corpus_metrics"] == {"readable": 1.0, "f1": pytest.approx(2 / 3)}


def test_programs_run_only_when_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'humaneval'.*Allow it with --allow-execution"):
        evaluate(EvaluateConfig(model="tiny-granite-h", task="humaneval", directory=str(tmp_path)), progress=False)
    allowed = EvaluateConfig(model="tiny-granite-h", task="humaneval", directory=str(tmp_path), allow_execution=True)
    with pytest.raises(DataError, match="holds no split"):
        evaluate(allowed, progress=False)
    row = {
        "id": "h",
        "input": "def f():\n",
        "target": "    pass",
        "entry_point": "f",
        "test": "def check(f):\n    pass",
    }
    write_rows(tmp_path / "code_humaneval" / "test.jsonl", [row])
    monkeypatch.setattr(evaluating, "evaluation_model", lambda config: None)
    monkeypatch.setattr(evaluating, "answer", lambda *arguments, **options: [("    return 1", True)])
    record = evaluate(allowed, progress=False)
    assert record["metrics"]["pass@1"] == 1.0 and set(record["sandbox"]) == {"isolated", "max_seconds", "max_bytes"}


def test_scores_are_told_by_length() -> None:
    examples = parity.TASK.examples("test", 1.0, None)[:10]
    scores = [parity.TASK.score(e.output if i % 5 else "x", e) for i, e in enumerate(examples)]
    found = by_variation(parity.TASK, examples, scores)
    assert list(found) == [f"length-{n:05d}" for n in parity.TASK.test_lengths]
    assert found["length-00016"] == {"exact": 0.0, "prefix": 0.0, "num": 2}
    assert found["length-00256"]["exact"] == 1.0


STUDY = {
    "name": "s",
    "model": "tiny-granite-h",
    "tasks": [{"name": "sentiment", "size": "1", "primary": "accuracy"}],
    "seeds": [0],
    "comparisons": [],
    "output_dir": "out",
}


def study(directory: Path, **cells: Any) -> StudyConfig:
    from ssmtune.config import decode

    return decode(StudyConfig, {**STUDY, "directory": str(directory), "cells": cells}, where="study")


def test_a_study_takes_a_set_and_a_base_with_shots(directory: Path) -> None:
    config = study(directory, base={}, shown={"shots": 4}, lora={"recipe": "all"})
    inputs = study_inputs(config)
    assert {"sentiment/train.jsonl.gz", "sentiment/test.jsonl.gz"} <= set(inputs)
    base, shown, lora = expand(config, inputs=inputs)
    assert (base.spec.shots, shown.spec.shots, lora.spec.directory) == (0, 4, str(directory))
    (fewer,) = (
        c for c in expand(study(directory, base={}, shown={"shots": 2}), inputs=inputs) if c.spec.cell == "shown"
    )
    assert fewer.digest != shown.digest
    # A cell without shots is the same whether others have some.
    assert base.digest == expand(study(directory, base={}), inputs=inputs)[0].digest
    # Where the files lie changes nothing, what they hold does.
    moved = expand(
        study(directory / ".." / directory.name, base={}, shown={"shots": 4}, lora={"recipe": "all"}), inputs=inputs
    )
    assert [cell.digest for cell in moved] == [base.digest, shown.digest, lora.digest]
    write_rows(directory / "tasks" / "sentiment" / "test.jsonl.gz", reviews(7, 100))
    assert study_inputs(config) != inputs


def test_shots_are_for_the_base_of_a_study(directory: Path) -> None:
    with pytest.raises(SsmtuneError, match="cells.lora: got 'shots' with a trained run"):
        study(directory, lora={"recipe": "all", "shots": 2})


def test_samples_need_no_data() -> None:
    for task in (*SOURCED, *SEQUENCES):
        assert len(sample_examples(task)) >= 2
