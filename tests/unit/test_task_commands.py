"""`ssmtune tasks`, and what `ssmtune evaluate` makes of sets, solved examples and the harness."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmtune import evaluate as evaluating
from ssmtune import harness
from ssmtune.cli import main as cli
from ssmtune.evaluate import EvaluateConfig
from ssmtune.harness import HarnessConfig
from ssmtune.records import new_record, write_json
from ssmtune.tasks.base import get_task, task_names

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `ssmtune ARGUMENTS` in this process and gives exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssmtune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), output.out, output.err

    return command


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with both sides of `sentiment`."""
    for split, num in (("train", 8), ("test", 3)):
        path = tmp_path / "data" / "sentiment" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"{split}{i}", "input": f"film {split} {i}", "target": "positive"} for i in range(num)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


@pytest.fixture
def run_directory(tmp_path: Path, directory: Path) -> Path:
    """What is left of a run on `sentiment` for an evaluation to start from."""
    config = {"model": "tiny-granite-h", "data": {"task": "sentiment", "size": 1.0, "directory": str(directory)}}
    write_json(tmp_path / "run" / "run.json", new_record("train", config=config, name="all"))
    return tmp_path / "run"


def test_tasks_lists_every_task_with_its_terms(run: Run, directory: Path) -> None:
    code, out, _ = run("tasks", "--data", str(directory), "--json")
    rows = {row["name"]: row for row in json.loads(out)["tasks"]}
    assert code == 0 and set(rows) == set(task_names())
    assert rows["sentiment"]["splits"] == ["train", "test"] and rows["cola"]["splits"] == []
    assert rows["needle"]["drawn"] and not rows["gsm8k"]["drawn"]
    assert rows["asdiv"]["licence"] == "CC-BY-NC-4.0; non-commercial"
    assert rows["humaneval"]["executes"] and not rows["humaneval"]["trained"]
    code, out, _ = run("tasks", "--data", str(directory))
    (line,) = (line for line in out.splitlines() if line.strip().startswith("sentiment"))
    assert code == 0 and "train test" in line and "50.0%" in line
    assert "non-commercial" in out and "share-alike" in out


def _record(task: str, name: str, **facts: Any) -> dict[str, Any]:
    scores = {"accuracy": [1.0, 0.0, 1.0]}
    facts = {"metrics": {"accuracy": 2 / 3}, "scores": scores, "example_ids": ["a", "b", "c"], **facts}
    return new_record("evaluate", config={}, name=name, task=task, primary="accuracy", **facts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EvaluateConfig | HarnessConfig]:
    """Every config that the command asks for; nothing is run."""
    found: list[EvaluateConfig | HarnessConfig] = []

    def evaluate(config: EvaluateConfig) -> dict[str, Any]:
        found.append(config)
        extra = {"corpus_metrics": {"f1": 0.8}, "chance": 0.5, "commonest": 0.75}
        return _record(config.task, config.name, variations={"length-2": {"accuracy": 1.0, "num": 3}}, **extra)

    def through_harness(config: HarnessConfig) -> list[dict[str, Any]]:
        found.append(config)
        return [_record(f"harness:{task}", config.name) for task in config.tasks]

    monkeypatch.setattr(evaluating, "evaluate", evaluate)
    monkeypatch.setattr(harness, "evaluate_harness", through_harness)
    return found


def test_a_run_is_shown_no_solved_examples_and_its_base_is(run: Run, run_directory: Path, asked: list[Any]) -> None:
    code, out, _ = run("evaluate", str(run_directory), "--shots", "4")
    ours, base = asked
    assert code == 0 and (ours.shots, base.shots) == (0, 4)
    assert ours.adapter and base.adapter is None and base.name == "base, 4 shots"
    assert ours.directory == base.directory == str(run_directory.parent / "data")
    for words in (
        "base, 4 shots",
        "f1 (whole set)",
        "80.0%",
        "accuracy, length-2",
        "of guessing 50.0%",
        "commonest answer 75.0%",
    ):
        assert words in out
    assert (run_directory / "evaluate-sentiment.json").is_file()
    code, _, err = run("evaluate", str(run_directory), "--shots", "4", "--no-base")
    assert code == 2 and "solved examples are shown to the base, which is not evaluated here" in err


def test_another_directory_may_be_given(run: Run, run_directory: Path, asked: list[Any]) -> None:
    assert run("evaluate", str(run_directory), "--data", "elsewhere", "--no-base")[0] == 0
    assert [config.directory for config in asked] == ["elsewhere"]


def test_a_model_alone_is_the_base(run: Run, asked: list[Any]) -> None:
    code, out, _ = run("evaluate", "tiny-granite-h", "--task", "needle", "--shots", "2", "--limit", "5", "--json")
    (config,) = asked
    assert code == 0 and (config.shots, config.num_examples, config.name) == (2, 5, "base, 2 shots")
    assert [record["task"] for record in json.loads(out)] == ["needle"]


def test_the_harness_is_asked_for_a_run_and_its_base(run: Run, run_directory: Path, asked: list[Any]) -> None:
    code, out, _ = run(
        "evaluate", str(run_directory), "--harness", "arc_easy,hellaswag", "--limit", "9", "--shots", "1"
    )
    ours, base = asked
    assert code == 0 and ours.tasks == base.tasks == ("arc_easy", "hellaswag")
    assert (ours.limit, ours.shots, ours.adapter) == (9, 1, str(run_directory / "adapter"))
    assert (base.adapter, base.name) == (None, "base")
    assert "harness:arc_easy" in out and "harness:hellaswag" in out
    assert {path.name for path in run_directory.glob("evaluate-*")} == {
        "evaluate-harness-arc_easy.json",
        "evaluate-harness-hellaswag.json",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--harness", "arc_easy", "--task", "rules"), "--harness: got --task as well"),
        (("--task", "rules", "--harness-tasks", "x"), "--harness-tasks is read with --harness alone"),
        (("--task", "humaneval"), "Allow it with --allow-execution"),
        (("--task", "gsm8q"), "nearest: 'gsm8k'"),
        (("--task", "cola"), "tasks/glue_cola/validation.jsonl.gz"),
        (("--task", "ultrachat"), "has no test side"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    options: tuple[str, ...], words: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSMTUNE_DATA", raising=False)
    code, out, err = run("evaluate", "tiny-granite-h", *options)
    assert code == 2 and words in err and "Traceback" not in err and out == ""


def test_an_answer_ends_at_a_stop_that_is_text() -> None:
    """Planted: a stop taken out of the middle of what the model writes."""
    from ssmtune.models import load_model, load_tokenizer

    model, tokenizer = load_model("tiny-granite-h", dtype="float32").eval(), load_tokenizer("tiny-granite-h")
    prompts = [[{"role": "user", "content": text}] for text in ("Name a table of orders.", "def main():")]
    whole = evaluating.answer(model, tokenizer, prompts, max_new_tokens=16, progress=False)
    text = max((text for text, _ in whole), key=len)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = evaluating.answer(
        model, tokenizer, prompts, max_new_tokens=16, stops=(*get_task("gsm8k").stops, stop), progress=False
    )
    for (before, ended), (after, stopped) in zip(whole, cut, strict=True):
        assert after == before.partition(stop)[0]
        assert stopped == (ended or stop in before)
    assert any(stop in before for before, _ in whole)
