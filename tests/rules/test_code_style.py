"""House rules that a machine can check: names, sizes, exports, exceptions, docstrings."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import ssmtune

ROOT = Path(ssmtune.__file__).parent
FILES = tuple(sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts))
IDS = tuple(str(path.relative_to(ROOT)) for path in FILES)
every_file = pytest.mark.parametrize("path", FILES, ids=IDS)

EXTENSION_FOLDERS = {"families", "methods", "tasks", "ops", "verify", "export", "cli"}

FORBIDDEN_MODULES = {"utils", "common", "helpers", "misc", "util", "helper"}
FORBIDDEN_PARTS = re.compile(r"(Manager|Handler|Factory|Wrapper|Mixin|Helper|Impl)(?![a-z])")

MODULE_CAP, EXTENSION_CAP = 350, 200
LONGER = {
    "tasks/_rule_patterns.py": "a table of patterns, one a line",
    "tasks/_values.py": "a table of value generators, one per kind of field",
    "ops/mamba2_chunk_scan/backward_kernels.py": "the kernels of one pass, in the order in which they run",
}
"""Files over the cap, each with the reason; a file that shrinks below it must leave the list."""


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@every_file
def test_no_forbidden_names(path: Path) -> None:
    names = {path.stem} | {part.name for part in path.parents if ROOT in part.parents}
    assert not names & FORBIDDEN_MODULES, names
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            assert not FORBIDDEN_PARTS.search(node.name), f"line {node.lineno}: class {node.name}"


def test_forbidden_names_are_recognised() -> None:
    assert all(FORBIDDEN_PARTS.search(name) for name in ("PlanManager", "ImplScan", "HTTPHandlerV2", "AHelper"))
    assert not any(FORBIDDEN_PARTS.search(name) for name in ("Implicit", "Mixing", "Plan", "Wrapped"))


@every_file
def test_modules_are_short(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    extends = path.stem not in ("__init__", "base") and EXTENSION_FOLDERS & set(path.relative_to(ROOT).parts)
    cap = EXTENSION_CAP if extends else MODULE_CAP
    length = len(path.read_text(encoding="utf-8").splitlines())
    if name in LONGER:
        assert length > cap, f"{name} has {length} lines, within the cap of {cap}: take it off the list"
    else:
        assert length <= cap, (
            f"{name} has {length} lines; the cap is {cap}. Split it by noun, or give the reason in LONGER"
        )


def test_the_list_of_long_files_is_true() -> None:
    assert set(LONGER) <= set(IDS), "a listed file does not exist"


@every_file
def test_no_blind_except(path: Path) -> None:
    """`BaseException` may be caught to clean up, if it is raised again."""
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"(all)"}
        assert not caught & {"Exception", "(all)"}, f"line {node.lineno}: catches {caught}"
        if "BaseException" in caught:
            last = node.body[-1]
            assert isinstance(last, ast.Raise), f"line {node.lineno}: BaseException is caught and not raised again"


@every_file
def test_public_names_have_docstrings(path: Path) -> None:
    """Modules, public functions and classes, and public methods of public classes."""
    module = tree(path)
    missing = [] if ast.get_docstring(module) or not module.body else ["the module"]
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                missing.append(f"line {node.lineno}: {node.name}")
            if isinstance(node, ast.ClassDef):
                missing += [
                    f"line {member.lineno}: {node.name}.{member.name}"
                    for member in node.body
                    if isinstance(member, ast.FunctionDef)
                    and not member.name.startswith(("_", "on_"))  # `on_*`: callbacks, whose meaning is the caller's
                    and not ast.get_docstring(member)
                    and not _is_protocol_member(node, member)
                ]
    assert not missing, missing


def _is_protocol_member(owner: ast.ClassDef, member: ast.FunctionDef) -> bool:
    """A protocol's `forward` is torch's, described by the class."""
    return (
        any(isinstance(base, ast.Name) and base.id == "Protocol" for base in owner.bases) and member.name == "forward"
    )


@every_file
def test_no_module_shadows_the_standard_library(path: Path) -> None:
    if path.parent == ROOT and path.stem != "__init__":
        assert path.stem not in sys.stdlib_module_names


@every_file
def test_ascii_only(path: Path) -> None:
    path.read_bytes().decode("ascii")


@every_file
def test_no_todo_and_no_pickle(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not re.search(r"^\s*(import pickle|from pickle|.*weights_only=False)", text, re.MULTILINE)


@every_file
def test_architectures_are_named_in_families_only(path: Path) -> None:
    """No `if model_type ==` outside families, no `if method ==` outside methods."""
    folder = path.parent.name
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            left = ast.unparse(node.left)
            constant = any(isinstance(c, ast.Constant) and isinstance(c.value, str) for c in node.comparators)
            if constant and left.endswith("model_type"):
                assert folder == "families", f"line {node.lineno}: {ast.unparse(node)}"
            if constant and left.endswith((".method", "method_name")):
                assert folder == "methods", f"line {node.lineno}: {ast.unparse(node)}"


def test_exports_are_what_is_importable() -> None:
    assert sorted(ssmtune.__all__) == list(ssmtune.__all__)
    assert set(ssmtune.__all__) == set(ssmtune._WHERE) | {"__version__"}
    for name in ssmtune.__all__:
        assert getattr(ssmtune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = ssmtune.atach  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(ssmtune.__all__) - {"__version__"}))
def test_public_names_are_never_hidden_by_their_module(name: str) -> None:
    """`ssmtune.attach` is the function whatever was imported before, at the first use and at the second."""
    where = ssmtune._WHERE[name]
    code = (
        f"import ssmtune, importlib; importlib.import_module({where!r})\n"
        f"first, second = ssmtune.{name}, ssmtune.{name}\n"
        f"assert callable(first) and first is second, (first, second)\n"
        f"from ssmtune import {name}\nassert {name} is first\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr.splitlines()[-1]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in (ROOT / "ops").glob("*/__init__.py")))
def test_operations_export_what_they_say(folder: str) -> None:
    module = importlib.import_module(f"ssmtune.ops.{folder}")
    assert module.__all__ and all(callable(getattr(module, name)) for name in module.__all__)


def test_file_names_fit_every_file_system() -> None:
    """A study's cells are named after its tasks, and a task of somebody's own has ":" in its name."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT.parents[1], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert len(names) > 500
    assert [name for name in names if re.search(r'[<>:"\\|?*]', name)] == []
