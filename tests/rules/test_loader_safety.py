"""No file of anybody's can make ssmtune run code: what reads pickles, or takes a model's own code, is not called anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = tuple(sorted(path for folder in ("src", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")))

PICKLING = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
"""Modules whose readers run what a file says."""
RUNS_PROGRAMS = {ROOT / "src/ssmtune/tasks/_sandbox_child.py": 1}
"""How often a file may call `exec`: in the sandbox's own process, what a model wrote, when the user allows it."""

FORBIDDEN_OPTIONS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True}


def unsafe_places(source: str) -> Iterator[str]:
    """Yield every import of a pickling module, every `torch.load` that is not `weights_only`, every unsafe option."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {m}" for m in modules if m.partition(".")[0] in PICKLING)
        if isinstance(node, ast.Call):
            options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            called = ast.unparse(node.func)
            if called in ("torch.load", "torch.jit.load") and options.get("weights_only") is not True:
                yield f"line {node.lineno}: {called} without weights_only=True"
            if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield f"line {node.lineno}: {called}"
            wrong = [name for name, value in FORBIDDEN_OPTIONS.items() if name in options and options[name] is value]
            yield from (f"line {node.lineno}: {name}={options[name]}" for name in wrong)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_nothing_reads_code_from_files(path: Path) -> None:
    found = list(unsafe_places(path.read_text(encoding="utf-8")))
    allowed = [place for place in found if place.endswith(": exec")][: RUNS_PROGRAMS.get(path, 0)]
    assert [place for place in found if place not in allowed] == []


def test_the_files_that_run_programs_are_known() -> None:
    assert {path for path in FILES if any(p.endswith(": exec") for p in unsafe_places(path.read_text()))} == set(
        RUNS_PROGRAMS
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib.memory",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_each_of_them_would_be_seen(source: str) -> None:
    assert list(unsafe_places(source))
    assert not list(unsafe_places("torch.load(path, weights_only=True)\nmodel.eval()\nyaml.safe_load(text)"))
