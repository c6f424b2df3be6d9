"""Docs say what the code and the records say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from ssmtune.families.base import family_names, get_family
from ssmtune.methods.base import method_names

ROOT = Path(__file__).parent.parent.parent


def _renderer() -> Any:
    spec = importlib.util.spec_from_file_location("render_docs", ROOT / "recipes" / "render_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RENDERER = _renderer()


@pytest.mark.parametrize(("page", "part"), [(page, part) for page, parts in RENDERER.PARTS.items() for part in parts])
def test_generated_parts_are_up_to_date(page: str, part: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    begin, end = f"<!-- generated:begin {part} -->", f"<!-- generated:end {part} -->"
    assert text.count(begin) == 1
    body = text.split(begin)[1].split(end)[0].strip()
    assert body == RENDERER.PARTS[page][part]().strip(), f"{page} is out of date: python recipes/render_docs.py"


def test_the_families_table_marks_every_method_that_a_family_can_take() -> None:
    """Methods act on tensors, on rows of them, or on states: of each kind one is looked up, where it is and is not."""
    header, _, *rows = (line.strip("| ").split(" | ") for line in RENDERER.families().splitlines())
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert set(table) == set(family_names())
    for method in ("initial_state", "state_offset_h", "state_offset_y"):
        marked = {name for name, row in table.items() if row[method] == "yes"}
        assert marked == {name for name in family_names() if get_family(name).states is not None}, method
    assert {row["lora"] for row in table.values()} == {"yes"}
    assert table["llama"]["core"] == "-" and table["mamba2"]["core"] == "yes"
    assert all("yes" in {row[method] for row in table.values()} for method in method_names())


def test_the_readme_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "ssmtune.json").is_file()
    assert type(names["merged"]).__name__ == "GraniteMoeHybridForCausalLM"


def test_the_tree_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("src/ssmtune/\n")[1].split("```")[0]
    for line in tree.splitlines():
        for name in re.findall(r"(\w+(?:\.py|/))", line.split("  ")[1] if line.startswith("  ") else line):
            inside = ROOT / "src/ssmtune" / name
            assert inside.exists() or (ROOT / name).exists(), f"README names {name}, which does not exist"
