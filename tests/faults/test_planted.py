"""The table of planted faults says what the tests do."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest
from planted import EVERY_FAMILY, PLANTED, RECURRENCES, Planted

from ssmtune.families.base import family_names
from ssmtune.verify.base import check_names

TESTS = Path(__file__).parent.parent
every_row = pytest.mark.parametrize("row", PLANTED, ids=lambda row: row.test.rpartition("::")[2])


def _function(row: Planted) -> tuple[ast.FunctionDef, str]:
    """The test of a row, and its source."""
    path, _, name = row.test.partition("::")
    text = (TESTS / path).read_text(encoding="utf-8")
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name]
    assert found, f"{row.test} does not exist"
    source = ast.get_source_segment(text, found[0])
    assert source is not None
    return found[0], source


@every_row
def test_the_named_check_is_the_one_that_fails(row: Planted) -> None:
    _, source = _function(row)
    if row.named_by in check_names() and row.families != EVERY_FAMILY:
        assert f'run("{row.named_by}", ' in source or f'.checks["{row.named_by}"]' in source
        assert "not result.ok" in source or row.named_by == "coverage"


@every_row
def test_the_families_are_those_of_the_test(row: Planted) -> None:
    node, _ = _function(row)
    path, _, name = row.test.partition("::")
    if row.families == EVERY_FAMILY:
        assert any(isinstance(d, ast.Name) and d.id in ("every_case", "every_fullest") for d in node.decorator_list)
        return
    if not path.startswith("faults/"):
        return
    marks = getattr(vars(import_module(Path(path).stem))[name], "pytestmark", [])
    cases = [case for mark in marks if mark.name == "parametrize" and mark.args[0] == "case" for case in mark.args[1]]
    # Without cases the fixture `make` builds a tiny Granite hybrid.
    assert {case[0] for case in cases} == set(row.families) if cases else row.families == ("granite_hybrid",)


def test_what_studies_suffered_is_planted_in_three_recurrent_families() -> None:
    published = [row for row in PLANTED if row.published]
    assert len(published) == 10
    assert set(RECURRENCES) <= set(family_names())
    for row in published:
        assert len(row.families) >= 3 or row.families == ("every task",), row.fault


def test_every_check_of_verify_has_been_seen_to_fail() -> None:
    # Agreement of the paths has its own row; the others are by name.
    assert set(check_names()) <= {row.named_by for row in PLANTED}
