"""Evaluation through lm-evaluation-harness, on task files of our own and nothing from a network."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtune import harness
from ssmtune.errors import ConfigError, DataError, MissingDependency
from ssmtune.evaluate import EvaluateConfig, evaluation_model
from ssmtune.harness import HarnessConfig, evaluate_harness
from ssmtune.models import load_tokenizer
from ssmtune.stats import paired_difference

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
num_fewshot: 0
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{target}
metadata: {{version: {version}}}
"""
MULTIPLE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"""
WRITTEN = """doc_to_target: " blue"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}"""
ROWS = [
    {"question": "The sky is", "choices": ["blue", "a table of cheese"], "answer": 0},
    {"question": "Grass is", "choices": ["a number", "green"], "answer": 1},
    {"question": "Snow is", "choices": ["white", "loud"], "answer": 0},
]


@pytest.fixture(scope="module")
def task_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of choices in a group, and one that is written."""
    directory = tmp_path_factory.mktemp("harness")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, kind, target, version in (
        ("ours_first", "multiple_choice", MULTIPLE, 3),
        ("ours_second", "multiple_choice", MULTIPLE, 1),
        ("ours_written", "generate_until", WRITTEN, 2),
    ):
        text = CHOICE.format(
            name=name,
            kind=kind,
            target=target,
            version=version,
            data=directory / "rows.jsonl",
            cache=directory / "cache",
        )
        (directory / f"{name}.yaml").write_text(text)
    (directory / "ours_both.yaml").write_text("group: ours_both\ntask: [ours_first, ours_second]\n")
    return directory


@pytest.fixture(scope="module")
def records(task_directory: Path, bundled_adapter: Path) -> list[dict[str, Any]]:
    config = HarnessConfig(
        model="tiny-granite-h",
        adapter=str(bundled_adapter),
        tasks=("ours_both", "ours_written"),
        task_directory=str(task_directory),
        limit=2,
    )
    return evaluate_harness(config)


def test_a_record_has_versions_metrics_and_a_score_per_example(records: list[dict[str, Any]]) -> None:
    both, written = records
    assert (both["kind"], both["task"], both["primary"]) == ("evaluate", "harness:ours_both", "acc_norm")
    assert both["task_version"] == {"ours_first": 3, "ours_second": 1}
    assert both["engine"]["name"] == "lm_eval" and both["engine"]["version"].startswith("0.4.")
    assert both["example_ids"] == ["ours_first/0", "ours_first/1", "ours_second/0", "ours_second/1"]
    for metric in ("acc", "acc_norm"):
        assert len(both["scores"][metric]) == 4
        means = [both["harness"][leaf][f"{metric},none"] for leaf in ("ours_first", "ours_second")]
        assert both["metrics"][metric] == pytest.approx(sum(means) / 2)
    assert (written["task"], written["primary"], written["task_version"]) == (
        "harness:ours_written",
        "exact_match",
        {"ours_written": 2},
    )
    assert json.dumps(records, allow_nan=False)


def test_the_harness_sees_the_adapter(records: list[dict[str, Any]], bundled_adapter: Path) -> None:
    """Log-likelihoods of the record are those of the merged model, and not those of its base."""
    tokenizer = load_tokenizer("tiny-granite-h")
    found = [value for value, _ in ast.literal_eval(records[0]["samples"][0]["completion"])]
    for adapter, same in ((str(bundled_adapter), True), (None, False)):
        model = evaluation_model(EvaluateConfig(model="tiny-granite-h", task="", adapter=adapter))
        expected = [_log_likelihood(model, tokenizer, "The sky is", f" {choice}") for choice in ROWS[0]["choices"]]
        assert (found == pytest.approx(expected, rel=1e-4)) is same


def _log_likelihood(model: Any, tokenizer: Any, context: str, ending: str) -> float:
    shown, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + ending))
    with torch.inference_mode():
        logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(len(shown), len(whole)))


def test_records_of_two_models_can_be_paired(records: list[dict[str, Any]]) -> None:
    scores = [records[0]["scores"]["acc"]]
    assert paired_difference(scores, scores, seed=0).difference == 0


def test_an_unknown_task_names_the_nearest(task_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Index:
        def __init__(self, **options: Any) -> None:
            self.all_tasks = ["ours_first", "arc_easy"]

    monkeypatch.setattr(harness, "_harness", lambda: (None, None, Index))
    config = HarnessConfig(model="tiny-granite-h", tasks=("arc_eazy",), task_directory=str(task_directory))
    with pytest.raises(ConfigError, match=r"--harness 'arc_eazy': lm_eval has no such task; nearest: 'arc_easy'"):
        evaluate_harness(config)
    with pytest.raises(ConfigError, match="--harness-tasks nowhere: is no directory"):
        evaluate_harness(HarnessConfig(model="tiny-granite-h", tasks=("x",), task_directory="nowhere"))


def test_a_set_that_cannot_be_fetched_is_an_error(task_directory: Path, tmp_path: Path) -> None:
    text = (task_directory / "ours_first.yaml").read_text().replace("ours_first", "ours_lost").replace("rows", "lost")
    (tmp_path / "ours_lost.yaml").write_text(text)
    with pytest.raises(DataError, match="--harness ours_lost: lm_eval cannot run it"):
        evaluate_harness(HarnessConfig(model="tiny-granite-h", tasks=("ours_lost",), task_directory=str(tmp_path)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ssmtune\[eval\]'"):
        evaluate_harness(HarnessConfig(model="tiny-granite-h", tasks=("x",)))
