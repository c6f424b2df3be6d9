"""The scorers of the catalogue on crafted answers: without a stop, with several answers, empty, cut off."""

from __future__ import annotations

import dataclasses
import sys
from fractions import Fraction
from typing import Any

import pytest

from ssmtune.errors import MissingDependency
from ssmtune.tasks import _text_metrics, humaneval, stsb
from ssmtune.tasks._labels import f1, first_mentioned, matthews, read_label
from ssmtune.tasks._numbers import first_number, last_number, to_value
from ssmtune.tasks._sourced import SourcedTask
from ssmtune.tasks._sql import is_ordered, read_sql, same_result
from ssmtune.tasks._text_metrics import rouge, word_f1
from ssmtune.tasks.base import STOPS, SidedTask, SourcedExample, Task, get_task, sample_examples, task_names

END = "<|end_of_text|>"
SCORED = [name for name in task_names() if get_task(name).metrics and isinstance(get_task(name), SidedTask)]
LABELLED = [name for name in SCORED if get_task(name).metrics == ("accuracy", "mentioned")]


def sample(name: str, **changes: Any) -> SourcedExample:
    """The first invented example of a task, with other fields."""
    found = sample_examples(get_task(name))[0]
    assert isinstance(found, SourcedExample)
    facts = {**found.facts, **changes.pop("facts", {})}
    return dataclasses.replace(found, facts=facts, **changes)


def primary(task: Task, completion: str, example: Any) -> float:
    return task.score(completion, example)[task.primary]


# Every task


@pytest.mark.parametrize("name", SCORED)
def test_the_right_answer_counts_up_to_its_stop_and_no_further(name: str) -> None:
    task = get_task(name)
    right, other = sample_examples(task)[:2]
    full = dict.fromkeys(task.metrics, 1.0)
    assert task.score(right.output, right) == full
    assert primary(task, other.output, right) < 0.5
    for stop in task.stops:
        assert task.score(f"{right.output}{stop}{other.output}", right) == full
        assert primary(task, f"{other.output}{stop}{right.output}", right) < 0.5
        assert primary(task, f"{stop}{right.output}", right) == 0.0
    assert set(STOPS) <= set(task.stops)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("completion", ["", "  \n\n", END, "\ud800", "{" * 3000, "9" * 5000, "####", "'", "```"])
def test_malformed_answers_are_wrong_and_never_raise(name: str, completion: str) -> None:
    task = get_task(name)
    scores = task.score(completion, sample_examples(task)[0])
    assert set(scores) == set(task.metrics) and all(0 <= value <= 1 for value in scores.values())
    assert scores[task.primary] < 0.1


@pytest.mark.parametrize("name", task_names())
def test_facts_of_a_task_are_whole(name: str) -> None:
    task = get_task(name)
    assert task.version >= 1 and task.licence and task.max_new_tokens > 0
    assert task.chance is None or 0 <= task.chance <= 1
    assert (task.primary in task.metrics) == bool(task.metrics)
    assert len({example.output for example in sample_examples(task)}) > 1
    if isinstance(task, SourcedTask):
        assert task.tested == bool(task.metrics) and (task.tested or task.trained)
        examples = task.sample_examples()
        texts = [example.output for example in examples]
        assert set(task.score_corpus(texts, examples) if task.tested else {}) == set(task.corpus_metrics)
        assert all(value == pytest.approx(1) for value in task.score_corpus(texts, examples).values())


def test_no_two_tasks_read_one_folder() -> None:
    folders = [task.folder for name in task_names() if isinstance(task := get_task(name), SourcedTask)]
    assert len(set(folders)) == len(folders)


# Labels


@pytest.mark.parametrize("name", LABELLED)
def test_label_tasks_read_the_first_line(name: str) -> None:
    task = get_task(name)
    right, other = sample_examples(task)[:2]
    label, wrong = right.output, other.output
    for completion, accuracy, mentioned in (
        (f"  {label.upper()}.\nbecause of this", 1, 1),
        (f'"{label}"', 1, 1),
        (f"The answer is {label}.", 0, 1),
        (f"{wrong}\n{label}", 0, 0),
        (f"{wrong} or rather {label}", 0, 0),
        (f"{label} {wrong}", 0, 1),
        (f"{label}x", 0, 0),
        (label[:-1], 0, 0),
    ):
        assert task.score(completion, right) == {"accuracy": accuracy, "mentioned": mentioned}, completion


def test_the_longest_label_at_one_place_is_the_one_mentioned() -> None:
    labels = ("entailment", "entailment not given")
    assert first_mentioned("entailment not given", labels) == "entailment not given"
    assert read_label("'Entailment'", labels) == "entailment"


def test_matthews_and_f1_give_known_values() -> None:
    # 6 true positives, 3 true negatives, 1 false positive, 2 false negatives: (18 - 2) / sqrt(7 * 8 * 4 * 5).
    expected = ["p"] * 8 + ["n"] * 4
    predicted = ["p"] * 6 + ["n"] * 2 + ["p"] + ["n"] * 3
    assert matthews(expected, predicted) == pytest.approx(16 / 1120**0.5)
    assert f1(expected, predicted, "p") == pytest.approx(12 / 15)
    assert matthews(expected, ["p"] * 12) == 0.0
    assert matthews(expected, expected) == 1.0
    assert matthews(expected, ["n" if e == "p" else "p" for e in expected]) == -1.0
    # Three classes: (c s - sum p t) / sqrt((s^2 - sum p^2)(s^2 - sum t^2)) with c = 3, s = 5.
    assert matthews(list("abcab"), list("abbaa")) == pytest.approx((15 - 10) / ((25 - 13) * (25 - 9)) ** 0.5)
    assert f1(["n"], ["n"], "p") == 0.0


def test_an_unreadable_answer_is_no_label() -> None:
    task = get_task("cola")
    assert isinstance(task, SourcedTask)
    examples = [sample("cola", output=label) for label in ("acceptable", "acceptable", "unacceptable", "unacceptable")]
    found = task.score_corpus(["acceptable", "perhaps", f"unacceptable{END}x", "acceptable"], examples)
    assert found["readable"] == 0.75
    # Three classes are given, two are there: (2 * 4 - (2 * 2 + 2 * 1)) / sqrt((16 - 6) * (16 - 8)).
    assert found["matthews"] == pytest.approx(2 / 80**0.5)


def test_clinc_takes_spaces_for_underscores_and_tells_scopes_apart() -> None:
    task = get_task("clinc150")
    assert isinstance(task, SourcedTask)
    asked = [sample("clinc150", output="bill_due"), sample("clinc150", output="oos"), sample("clinc150", output="oos")]
    assert task.score("Bill due.\nmore", asked[0]) == {"accuracy": 1.0}
    found = task.score_corpus(["bill_due", "alarm", "oos"], asked)
    assert found == {"in_scope_accuracy": 1.0, "out_of_scope_recall": 0.5}


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("2.5", 2.5),
        ("5", 5.0),
        ("3 of 5", 3.0),
        ("4.0\n1.0", 4.0),
        ("5.1", None),
        ("about 3", None),
        ("1,500", None),
        ("-1", None),
    ],
)
def test_stsb_reads_one_number(completion: str, value: float | None) -> None:
    assert stsb.read_value(completion) == value


def test_stsb_correlates_over_all_answers() -> None:
    examples = [sample("stsb", output=value) for value in ("0.0", "1.0", "5.0")]
    found = stsb.TASK.score_corpus(["0.0", "2.0", "4.0"], examples)
    # Pearson of (0, 2, 4) with (0, 1, 5): 10 / sqrt(8 * 14); the ranks agree.
    assert found["pearson"] == pytest.approx(10 / (8 * 14) ** 0.5) and found["spearman"] == pytest.approx(1)
    assert stsb.TASK.score_corpus(["2.5"] * 3, examples) == {"pearson": 0.0, "spearman": 0.0}
    assert stsb.TASK.score("4.0", examples[2])["closeness"] == pytest.approx(0.8)


# Numbers


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("7", 7, 7),
        ("$1,200.50 in all", Fraction(2401, 2), Fraction(2401, 2)),
        ("12 - 5 = <<12-5=7>>7 pears", 12, 7),
        ("5/2", Fraction(5, 2), Fraction(5, 2)),
        ("-3 degrees, 40%", -3, 40),
        ("1,5", 1, 5),
        ("v2 x", None, None),
        ("3/0", None, None),
        ("", None, None),
    ],
)
def test_numbers_are_read_by_value(text: str, first: Any, last: Any) -> None:
    assert (first_number(text), last_number(text)) == (first, last)


def test_a_number_of_thousands_of_digits_is_none() -> None:
    assert to_value("9" * 100_000) is None and to_value("2.50") == to_value("5/2")


GSM = sample("gsm8k", output="x\n#### 18", facts={"answer_number": "18"})


@pytest.mark.parametrize(
    ("completion", "exact", "last_number", "marked"),
    [
        ("16 - 3 = 13\n#### 18", 1, 1, 1),
        ("#### $18.00 a day", 1, 1, 1),
        ("#### 18\n#### 5", 1, 1, 1),
        ("#### 18\n\nQuestion: How many?\n#### 7", 1, 1, 1),
        ("#### 5\n#### 18", 0, 0, 1),
        (f"#### 5{END}#### 18", 0, 0, 1),
        ("The answer is 18.", 0, 1, 0),
        ("first 18, then 17", 0, 0, 0),
        ("She has 18\nQuestion: And 5 more?", 0, 1, 0),
        ("it is 18 ####", 0, 1, 0),
        ("####\n18", 0, 0, 0),
        ("16 - 3 = 1", 0, 0, 0),
        ("#### 18,000", 0, 0, 1),
        ("#### 1", 0, 0, 1),
    ],
)
def test_gsm8k_score(completion: str, exact: float, last_number: float, marked: float) -> None:
    found = get_task("gsm8k").score(completion, GSM)
    assert found == {"exact": exact, "last_number": last_number, "marked": marked}


def test_gsm8k_takes_the_first_marker_where_a_published_study_took_the_last() -> None:
    """Planted: what that study scored, a model that went on with a further problem."""
    completion = "She sells 9.\n#### 18\n\nA shop has 4 bags.\n#### 4"
    assert get_task("gsm8k").score(completion, GSM)["exact"] == 1
    last = completion.rpartition("####")[2].strip()
    assert last == "4" != GSM.facts["answer_number"]


@pytest.mark.parametrize(
    ("completion", "answer", "number", "exact", "unit"),
    [
        ("8 cups", "8 cups", "8", 1, 1),
        ("8", "8 cups", "8", 1, 0),
        ("8 cups of tea\n9", "8 cups", "8", 1, 0),
        ("9 cups, no, 8 cups", "8 cups", "8", 0, 0),
        ("$8.00", "8 dollars", "8", 1, 0),
        ("10/4", "5/2", "5/2", 1, 0),
        ("Ben", "Ben", "", 1, 1),
        ("Eve, then Ben", "Ben", "", 0, 0),
    ],
)
def test_asdiv_score(completion: str, answer: str, number: str, exact: float, unit: float) -> None:
    example = sample("asdiv", output=answer, facts={"answer_number": number})
    assert get_task("asdiv").score(completion, example) == {"exact": exact, "with_unit": unit}


# SQL


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("SELECT a FROM t;", "SELECT a FROM t"),
        ("select a from t", "select a from t"),
        ("Sure:\n```sql\nselect a\nfrom t;\n```\nor ```select b```", "select a\nfrom t"),
        ("```sqlite\nselect 1", "select 1"),
        ("select a; select b", "select a"),
        ("select a from t\n\nThis query reads a.", "select a from t"),
        ("select ';' as x from t; drop", "select ';' as x from t"),
        ("WITH c AS (SELECT 1) SELECT * FROM c", "WITH c AS (SELECT 1) SELECT * FROM c"),
        ("nothing", "nothing"),
        ("", ""),
    ],
)
def test_the_first_statement_is_taken(text: str, sql: str) -> None:
    assert read_sql(text) == sql


@pytest.mark.parametrize(
    ("given", "expected", "ordered", "same"),
    [
        ([[1, "a"], [2, "b"]], [[2, "b"], [1, "a"]], False, True),
        ([[1, "a"], [2, "b"]], [[2, "b"], [1, "a"]], True, False),
        ([["a", 1], ["b", 2]], [[1, "a"], [2, "b"]], True, True),
        # Columns are exchanged as a whole, not row by row.
        ([[1, 2], [4, 3]], [[1, 2], [3, 4]], False, False),
        ([[1], [1], [2]], [[1], [2], [2]], False, False),
        ([[3.0]], [[3]], False, True),
        ([[0.1 + 0.2]], [[0.3]], False, True),
        ([[1.01]], [[1.02]], False, False),
        ([["3"]], [[3]], False, False),
        ([[None]], [["None"]], False, False),
        ([], [], True, True),
        ([[1, 1]], [[1]], False, False),
        ([], [[1]], False, False),
        ([[1] * 12], [[1] * 11 + [2]], False, False),
    ],
)
def test_results_are_compared_as_rows(given: Any, expected: Any, ordered: bool, same: bool) -> None:
    assert same_result(given, expected, ordered=ordered) is same


def test_order_is_asked_for_outside_brackets_alone() -> None:
    assert is_ordered("select a from t ORDER  BY a limit 1")
    assert not is_ordered("select a from (select a from t order by a)")
    assert not is_ordered("select 'order by' from t")


@pytest.mark.parametrize(
    ("completion", "execution", "valid"),
    [
        ("SELECT COUNT(id) AS n FROM ship", 1, 1),
        ("```sql\nselect sum(1) from ship;\n```", 1, 1),
        ("select 3; select count(*) from ship", 0, 1),
        (f"select count(*) from ship{END}; drop table ship", 1, 1),
        ("select count(*) from boat", 0, 0),
        ("delete from ship", 0, 0),
        ("select count( fro", 0, 0),
        ("with recursive c(x) as (select 1 union all select x + 1 from c) select x from c", 0, 0),
    ],
)
def test_text_to_sql_runs_the_query(completion: str, execution: float, valid: float) -> None:
    task = get_task("text_to_sql")
    assert task.score(completion, sample_examples(task)[0]) == {"execution": execution, "valid": valid}


def test_any_reference_is_right_and_its_order_counts() -> None:
    references = ["select name from ship order by tons desc;", "select id from ship order by tons desc;"]
    example = sample("text_to_sql", facts={"references": references})
    scores = [
        primary(get_task("text_to_sql"), q, example)
        for q in ("select id from ship order by id desc", "select id from ship")
    ]
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "exact"),
    [
        ("SELECT count(ship.*)", 1),
        ("select count ( ship.* ) ; select 1", 1),
        ("select count ( boat.* )", 0),
        ("select ship.name\n\nselect count ( ship.* )", 0),
        ("select count (", 0),
    ],
)
def test_spider_compares_parts(completion: str, exact: float) -> None:
    task = get_task("spider")
    assert primary(task, completion, sample_examples(task)[0]) == exact


# Texts


def test_texts_are_compared_with_the_nearest_reference() -> None:
    example = sample("e2e", facts={"references": ["It is a pub.", "Thai food is served at the harbour."]})
    task = get_task("e2e")
    assert task.score("Thai food is served at the harbour.", example) == {"chrf": 1.0, "rougeL": 1.0}
    assert 0.3 < primary(task, "Thai food is served", example) < 1


def test_rouge_and_word_f1_give_known_values() -> None:
    # Three of four words on each side, two of three pairs, a common run of three.
    found = rouge("the cat sat down", ["the cat sat up"])
    assert found == pytest.approx({"rouge1": 0.75, "rouge2": 2 / 3, "rougeL": 0.75})
    assert word_f1("The old, old house", ["an old barn"]) == pytest.approx(2 / 5)
    assert word_f1("", ["x"]) == 0.0


def test_bleu_uses_every_reference_of_every_example() -> None:
    task = get_task("dart")
    assert isinstance(task, SourcedTask)
    first = sample(
        "dart", facts={"references": ["Oslo lies in the south of Norway.", "Oslo is in Norway, in the south."]}
    )
    second = sample("dart", output="Ada flies planes for a living.", facts={"references": None})
    texts = ["Oslo is in Norway, in the south.", "Ada flies planes for a living."]
    assert task.score_corpus(texts, [first, second]) == pytest.approx({"bleu": 1.0, "chrf": 1.0})
    assert task.score_corpus(texts[::-1], [first, second])["bleu"] < 0.1


@pytest.mark.parametrize(("name", "module"), [("xsum", "rouge_score"), ("dart", "sacrebleu")])
def test_a_missing_package_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _text_metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=r"pip install 'ssmtune\[eval\]'"):
        get_task(name).score("x", sample(name))


def test_narrativeqa_reads_one_line() -> None:
    example = sample("narrativeqa")
    assert get_task("narrativeqa").score("a clock\nQuestion: Whom did she save?", example)["rougeL"] == 1.0


# Code

TASK = humaneval.TASK
ADD, TWICE = TASK.sample_examples()


@pytest.mark.parametrize(
    ("completion", "passed", "compiles"),
    [
        ("    return sum(values)", 1, 1),
        ("return sum(values)", 1, 1),
        ("    return sum(values)\n\ndef other():\n    return 1/0\n\nprint(other())", 1, 1),
        ("    total = 0\n    for v in values:\n        total += v\n    return total\nprint(", 1, 1),
        ("Here you are:\n```python\ndef add_all(values):\n    return sum(values)\n```\nIt adds.", 1, 1),
        (
            "```python\ndef add_all(values):\n    return 0\n```\n```python\ndef add_all(values):\n    return sum(values)\n```",
            0,
            1,
        ),
        ("```\n    return sum(values)\n```", 1, 1),
        (f"    return sum(values){END}    syntax error", 1, 1),
        ("    return sum(values", 0, 0),
        ("    return 0", 0, 1),
        ("    import sys; sys.exit(0)", 0, 1),
        ("    import os; os._exit(0)", 0, 1),
        ("", 0, 1),
        ("I cannot do that.", 0, 0),
    ],
)
def test_humaneval_runs_the_tests(completion: str, passed: float, compiles: float) -> None:
    assert TASK.score(completion, ADD) == {"pass@1": passed, "compiles": compiles}


def test_a_program_that_is_never_run_would_count_as_right() -> None:
    """Planted: a check of the text, as in a published study, takes a function that only looks like the answer."""
    looks_right = "    return sum(values) + 0 * len(values) - 1"
    assert "return sum(values)" in looks_right and TASK.score(looks_right, ADD)["pass@1"] == 0


# Drawn sequences


def test_sequence_scores_count_the_words_that_are_right_from_the_start() -> None:
    task = get_task("copying")
    example = dataclasses.replace(sample_examples(task)[0], output="a b c d")
    for completion, exact, prefix in (
        ("a b c d\nmore", 1, 1),
        ("a b c", 0, 0.75),
        ("a b c d e", 0, 1),
        ("a x c d", 0, 0.25),
        ("x b c d", 0, 0),
    ):
        assert task.score(completion, example) == {"exact": exact, "prefix": prefix}
