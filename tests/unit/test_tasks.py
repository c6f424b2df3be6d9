"""Tasks: exact sizes, determinism, no leak across the split, and scorers on crafted answers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ssmtune.errors import ConfigError
from ssmtune.records import digest
from ssmtune.tasks import classification, mapping, rules
from ssmtune.tasks._catalogue import apportion, catalogue, schemas_at, slots
from ssmtune.tasks.base import (
    Example,
    GeneratedTask,
    get_task,
    messages,
    near_duplicates,
    shingles,
    similarity,
    split,
    stop_text,
    task_names,
)

SMALL = 0.02
END = "<|end_of_text|>"


@pytest.fixture(scope="module", params=["classification", "mapping", "rules"])
def task(request: pytest.FixtureRequest) -> GeneratedTask:
    found = get_task(request.param)
    assert isinstance(found, GeneratedTask)
    return found


def example(output: str | dict[str, object]) -> Example:
    text = output if isinstance(output, str) else json.dumps(output)
    return Example(id="x", instruction="Do it.", input="a\tb", output=text, schema="s", variation="v")


# Discovery


def test_tasks_are_found_by_file_name() -> None:
    folder = Path(classification.__file__).parent
    assert task_names() == tuple(sorted(p.stem for p in folder.glob("[a-z]*.py") if p.stem != "base"))
    assert {"classification", "mapping", "rules", "gsm8k", "cola", "humaneval", "needle"} <= set(task_names())


def test_task_answers_to_its_own_name(task: GeneratedTask) -> None:
    assert get_task(task.name) is task
    assert task.primary in task.metrics


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'clasification'; nearest: 'classification'"):
        get_task("clasification")


def test_third_party_task_is_imported_by_path() -> None:
    assert get_task("ssmtune.tasks.rules:TASK") is rules.TASK


@pytest.mark.parametrize(("name", "message"), [("no_such_module_x:TASK", "cannot be found"), ("json:dumps", "no task")])
def test_bad_third_party_task_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_task(name)


def test_tasks_import_neither_torch_nor_transformers_nor_the_catalogue() -> None:
    code = (
        "import sys; from ssmtune.tasks import base, _catalogue as c; [base.get_task(n) for n in base.task_names()];"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'rouge_score', 'sacrebleu', 'lm_eval'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert c.catalogue.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# Catalogue and sizes


def test_catalogue_has_611_distinct_schemas() -> None:
    schemas = catalogue()
    assert len({s.label for s in schemas}) == len({frozenset(c.name for c in s.columns) for s in schemas}) == 611
    assert all(8 <= len(s.columns) <= 12 and len(s.label) <= 30 for s in schemas)
    assert len({s.domain for s in schemas[:40]}) == 40


def test_full_sizes_are_those_of_the_study() -> None:
    assert [task.full_size for task in (classification.TASK, mapping.TASK, rules.TASK)] == [24_369, 15_222, 9_165]


def test_full_size_has_the_exact_count_of_every_variation() -> None:
    assert Counter(v for _, v in slots(classification.COUNTS, 1.0)) == classification.COUNTS
    assert classification.COUNTS == {
        "full": 2436, "partial": 2443, "renamed": 3627, "minimal": 2440, "shuffled": 2437, "mixed_case": 2434,
        "extra_columns": 2439, "api_export": 2434, "legacy": 1837, "confusable": 1842,
    }  # fmt: skip
    counts = Counter(v for _, v in slots(mapping.COUNTS, 1.0))
    assert counts == mapping.COUNTS and set(counts.values()) == {1902, 1903} and sum(counts.values()) == 15_222


def test_full_size_has_15_rules_a_schema_over_all_patterns() -> None:
    planned = rules.planned(1.0)
    assert set(Counter(schema.label for schema, _ in planned).values()) == {15}
    counts = Counter(pattern for _, pattern in planned)
    assert set(counts) == set(rules.PATTERNS) and min(counts.values()) > 500


def test_small_size_has_fewer_schemas_and_fewer_examples_of_each() -> None:
    assert len(schemas_at(SMALL)) == 40
    planned = slots(classification.COUNTS, SMALL)
    assert len(planned) == 487
    assert set(Counter(schema.label for schema, _ in planned).values()) == {12, 13}


def test_apportion_is_exact() -> None:
    assert apportion({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}


@pytest.mark.parametrize("size", [0.0, -1.0, 1.5, math.nan])
def test_size_out_of_range_is_refused(task: GeneratedTask, size: float) -> None:
    with pytest.raises(ConfigError, match="task size"):
        task.generate(size, 0)


# Generation


DIGESTS = {"classification": "0e5cb92e4aef33ca", "mapping": "e1030e1b84e7a676", "rules": "c57fef59ba9605e1"}


def test_examples_are_pinned(task: GeneratedTask) -> None:
    """A change here changes published figures: raise the task's `version` with it."""
    examples = [dataclasses.asdict(e) for e in task.generate(SMALL, 0)]
    assert examples == [dataclasses.asdict(e) for e in task.generate(SMALL, 0)]
    assert digest(examples) == DIGESTS[task.name]


def test_another_seed_gives_other_examples_of_the_same_plan(task: GeneratedTask) -> None:
    first, second = task.generate(SMALL, 0), task.generate(SMALL, 1)
    assert [(e.id, e.schema, e.variation) for e in first] == [(e.id, e.schema, e.variation) for e in second]
    assert sum(a.input == b.input for a, b in zip(first, second, strict=True)) < len(first) // 20


def test_examples_fit_a_short_context_and_are_ascii(task: GeneratedTask) -> None:
    for e in task.generate(SMALL, 0):
        assert len(e.instruction) + len(e.input) + len(e.output) < 1400
        assert (e.instruction + e.input + e.output).isascii()
        # Two bytes a token is a pessimistic tokenizer.
        assert len(e.output) < 2 * task.max_new_tokens


def test_the_right_answer_scores_1_on_every_metric(task: GeneratedTask) -> None:
    for e in task.generate(0.005, 3):
        assert task.score(e.output, e) == dict.fromkeys(task.metrics, 1.0)
        assert task.score(f"{e.output}{END}\n{{}} more", e) == dict.fromkeys(task.metrics, 1.0)


@pytest.mark.parametrize(
    "completion", ["", "   \n", END, "{", "}", "[1]", "null", '{"mapping": {', "\ud800", "{" * 5000, '{"a":' * 5000]
)
def test_malformed_answers_score_0_and_never_raise(task: GeneratedTask, completion: str) -> None:
    e = task.generate(0.001, 0)[0]
    assert task.score(completion, e) == dict.fromkeys(task.metrics, 0.0)


def test_tables_are_rectangular_with_distinct_headers() -> None:
    for e in classification.TASK.generate(SMALL, 0):
        header, *rows = [line.split("\t") for line in e.input.split("\n")]
        assert len(rows) in (2, 3) and {len(row) for row in rows} == {len(header)}
        assert len({h.lower() for h in header}) == len(header)


def test_mapping_answers_cover_the_expected_columns_once() -> None:
    for e in mapping.TASK.generate(SMALL, 0):
        question, answer = json.loads(e.input), json.loads(e.output)
        assert set(answer["mapping"]) <= set(question["file_headers"])
        assert sorted([*answer["mapping"].values(), *answer["unmapped_expected"]]) == sorted(
            question["expected_columns"]
        )
        assert len(set(question["file_headers"])) == len(question["file_headers"])


def test_rules_are_a_function_of_the_question_and_name_a_shown_column() -> None:
    for e in rules.TASK.generate(SMALL, 0):
        question, answer = json.loads(e.input), json.loads(e.output)
        again = rules.rule(question["schema_label"], question["columns"], rules.PATTERNS[question["pattern_type"]])
        assert answer == again and tuple(answer) == rules.FIELDS
        subject = answer["metadata_ids"][0].split(".")[1]
        assert subject in question["columns"] and subject in answer["where_clause"]


# Split and near-duplicates


def test_split_is_disjoint_whole_and_repeatable(task: GeneratedTask) -> None:
    examples = task.generate(SMALL, 0)
    parts = split(examples)
    assert sorted(e.id for e in parts.train + parts.test) == sorted(e.id for e in examples)
    assert len(parts.test) == math.ceil(len(examples) / 10)
    assert parts == split(examples) != split(examples, seed=43)


def test_no_near_duplicates_across_the_split_and_a_planted_one_is_found(task: GeneratedTask) -> None:
    parts = split(task.generate(SMALL, 0))
    assert near_duplicates(parts.train, parts.test) == []
    # One word changed at the end of a long input leaves most shingles as they were.
    victim = max(parts.test, key=lambda e: len(e.input))
    planted = dataclasses.replace(victim, id="planted", input=victim.input[:-6] + "zzz")
    found = near_duplicates([*parts.train, planted], parts.test)
    assert [(a.id, b.id) for a, b, _ in found] == [("planted", victim.id)]
    elsewhere = dataclasses.replace(planted, schema="another")
    assert near_duplicates([*parts.train, elsewhere], parts.test) == []


def test_similarity_is_the_jaccard_index_of_word_triples() -> None:
    assert similarity(shingles("a b c d"), shingles("A-B-C, x")) == pytest.approx(1 / 3)
    assert similarity(shingles("one"), shingles("one")) == 1.0
    assert similarity(shingles("one"), shingles("two words")) == 0.0


# Messages and stops


def test_messages_put_instruction_and_input_into_one_user_turn() -> None:
    prompt, completion = messages(example("out"))
    assert prompt == [{"role": "user", "content": "Do it.\n\na\tb"}]
    assert completion == [{"role": "assistant", "content": "out"}]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a", "a"), (f"a{END}b", "a"), (f"a<|start_of_role|>user{END}", "a"), (f"{END}a", ""), ("", "")],
)
def test_stop_text_cuts_at_the_first_stop(text: str, kept: str) -> None:
    assert stop_text(text) == kept


# Scorers


@pytest.mark.parametrize(
    ("completion", "exact", "contains"),
    [
        ("jira_issue", 1, 1),
        ("  JIRA_Issue \nbecause of the key", 1, 1),
        (f"jira_issue{END}xero_invoice", 1, 1),
        ("jira_issue xero_invoice", 0, 1),
        ("The label is jira_issue.", 0, 1),
        ("xero_invoice\njira_issue", 0, 0),
        (f"xero_invoice{END}jira_issue", 0, 0),
        ("jira_issue_type", 0, 0),
        ("jira_iss", 0, 0),
    ],
)
def test_classification_score(completion: str, exact: float, contains: float) -> None:
    assert classification.TASK.score(completion, example("jira_issue")) == {"exact": exact, "contains": contains}


MAPPING = {"mapping": {"A": "a", "B": "b"}, "unmapped_expected": ["c", "d"]}
RIGHT = json.dumps(MAPPING)
WRONG = json.dumps({"mapping": {"A": "b", "B": "a"}, "unmapped_expected": []})


@pytest.mark.parametrize(
    ("completion", "valid", "mapped", "unmapped"),
    [
        (RIGHT, 1, 1, 1),
        (f"Here it is: {RIGHT} I hope it helps", 1, 1, 1),
        (f"{RIGHT}{END}{WRONG}", 1, 1, 1),
        (f"{RIGHT}\n{WRONG}", 1, 1, 1),
        (f"{WRONG}\n{RIGHT}", 1, 0, 0),
        (f"{WRONG}{END}{RIGHT}", 1, 0, 0),
        (f"{END}{RIGHT}", 0, 0, 0),
        (RIGHT[:-1], 0, 0, 0),
        (f"{{broken}} {RIGHT}", 0, 0, 0),
        ('{"mapping": {"A": "a"}, "unmapped_expected": ["d"]}', 1, 0.5, 0.5),
        ('{"mapping": {"A": "a", "B": "b", "C": "c"}, "unmapped_expected": ["d", "c", "e"]}', 1, 1, 1),
        ('{"mapping": ["A", "a"], "unmapped_expected": {"c": 1}}', 1, 0, 0),
        ('{"mapping": {"A": ["a"], "B": {"b": 1}}, "unmapped_expected": [["c"], {"d": 1}, null]}', 1, 0, 0),
        ('{"mapping": 3, "unmapped_expected": "cd"}', 1, 0, 0),
        ('{"mapping": null}', 1, 0, 0),
        ("{}", 1, 0, 0),
        (f'{{"mapping": {"9" * 5000}}}', 0, 0, 0),
    ],
)
def test_mapping_score(completion: str, valid: float, mapped: float, unmapped: float) -> None:
    score = mapping.TASK.score(completion, example(MAPPING))
    assert score == {"json_valid": valid, "mapping_accuracy": mapped, "unmapped_accuracy": unmapped}


@pytest.mark.parametrize(("listed", "value"), [("[]", 1), ('["x"]', 0), ("null", 0), ("[1]", 0), ("[[]]", 0)])
def test_unmapped_score_when_nothing_is_unmapped(listed: str, value: float) -> None:
    expected = example({"mapping": {"A": "a"}, "unmapped_expected": []})
    completion = f'{{"mapping": {{"A": "a"}}, "unmapped_expected": {listed}}}'
    assert mapping.TASK.score(completion, expected)["unmapped_accuracy"] == value


RULE = {
    "rule_type": "stale_record",
    "severity": "high",
    "description": "d",
    "where_clause": "a < b",
    "metadata_ids": ["s.a"],
}
RULE_TEXT = json.dumps(RULE)


@pytest.mark.parametrize(
    ("completion", "scores"),
    [
        (RULE_TEXT, (1, 1, 1, 1)),
        (RULE_TEXT.replace("high", "HIGH "), (1, 1, 1, 1)),
        (f"{RULE_TEXT}{END}invented", (1, 1, 1, 1)),
        (f"{RULE_TEXT.replace('high', 'low')} {RULE_TEXT}", (1, 1, 0, 1)),
        (RULE_TEXT.replace("stale", "aged"), (1, 1, 1, 0)),
        ('{"severity": "high"}', (1, 0, 1, 0)),
        ('{"severity": ["high"], "rule_type": {"stale_record": 1}}', (1, 0, 0, 0)),
        ('{"severity": 3, "rule_type": null}', (1, 0, 0, 0)),
        (RULE_TEXT[:-2], (0, 0, 0, 0)),
        (f"[{RULE_TEXT}]", (1, 1, 1, 1)),
    ],
)
def test_rules_score(completion: str, scores: tuple[float, ...]) -> None:
    assert tuple(rules.TASK.score(completion, example(RULE)).values()) == scores
