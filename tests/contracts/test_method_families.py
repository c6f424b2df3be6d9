"""The shipped table of which families can take which method is the truth of their tiny models."""

from __future__ import annotations

import pytest
from contracts.tiny import CASES, tiny_inventory

from ssmtune.cli.methods import method_rows
from ssmtune.methods.base import get_method, method_names


@pytest.mark.parametrize("method", method_names())
def test_families_of_a_method_are_those_that_have_its_roles(method: str) -> None:
    (row,) = (row for row in method_rows() if row["name"] == method)
    allows = get_method(method).allows
    usable = {case[0] for case in CASES if any(allows(c) for c in tiny_inventory(case).everything)}
    assert row["families"] == sorted(usable), "out of date: python recipes/render_docs.py"
    assert row["families"]
