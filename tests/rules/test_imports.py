"""Imports go one way along the flow, in-function imports counted; what must load quickly loads no heavy package."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import ssmtune

ROOT = Path(ssmtune.__file__).parent

ORDER = (
    {"errors"},
    {
        "config",
        "records",
        "stats",
        "crossed",
        "cache",
        "packing",
        "discovery",
        "component",
        "recipe",
        "balanced_truncation",
        "checkpoint",
        "full_disk",
    },
    {"ops"},
    {"families", "methods", "tasks", "data", "models", "s4d_model", "parallel_gated_delta_model", "llamacpp"},
    {
        "operations",
        "virtual_tokens",
        "base_digest",
        "base_tensors",
        "branches",
        "weight_units",
        "rounding",
        "quantized",
        "four_bit",
    },
    {"inventory", "probe"},
    {"placement", "budget", "quantize"},
    {"plan"},
    {"peft_layers", "selection", "fast", "edits"},
    {"attach", "adapter_files"},
    {"base_stream", "merged_files", "restore", "merge_difference"},
    {"head_loss", "memory"},
    {"graphs"},
    {"row_merge"},
    {"merge", "core_report", "core_guard", "schedules", "widen", "compiled", "truncate", "adapters", "adapter_set"},
    {"training_data"},
    {"train", "sft", "watch", "warmup"},
    {"verify", "doctor", "op_cases", "export"},
    {"evaluate", "evaluate_llamacpp", "harness", "bench", "bench_batch", "bench_side", "bench_profile"},
    {"workers", "ray_workers"},
    {"study", "study_analysis", "study_cells", "study_config", "study_estimate", "study_runs"},
    {"report"},
    {"demo"},
    {"cli"},
)
"""The flow of the design, first to last: a unit imports from earlier rows and its own, never from later ones."""

RANK = {unit: rank for rank, row in enumerate(ORDER) for unit in row}


@lru_cache
def modules() -> dict[str, Path]:
    """Dotted name below ssmtune -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and "assets" not in parts:
            found[name] = path
    return found


def unit_of(name: str) -> str:
    return name.partition(".")[0]


def imports_of(path: Path, *, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import in a file, wherever it stands."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if runtime_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides where it goes"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def own_imports(name: str, *, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (unit of ssmtune, line) that a module imports."""
    for target, line in imports_of(modules()[name], runtime_only=runtime_only):
        if target == "ssmtune" or target.startswith("ssmtune."):
            yield target.removeprefix("ssmtune").removeprefix(".").partition(".")[0], line


def test_every_unit_has_a_place_in_the_flow() -> None:
    unknown = sorted({unit_of(name) for name in modules()} - set(RANK))
    assert not unknown, f"give {unknown} a row in ORDER, where the flow needs them"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_along_the_flow(name: str) -> None:
    """Those for annotations count as well: what a later stage knows is no business of an earlier one."""
    unit = unit_of(name)
    wrong = [
        f"line {line}: {unit} imports {target}, which comes later"
        for target, line in own_imports(name)
        if target in RANK and RANK[target] > RANK[unit]
    ]
    assert not wrong, wrong


def test_modules_form_no_cycle() -> None:
    """Also within a row of the flow; imports for annotations do not run and are left out."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        targets = {t.removeprefix("ssmtune.") for t, _ in imports_of(path, runtime_only=True) if "ssmtune." in t}
        graph[name] = {t if t in modules() else t.rpartition(".")[0] for t in targets} & set(modules()) - {name}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_two_units_import_each_other() -> None:
    edges = {
        (unit_of(name), target)
        for name in modules()
        for target, _ in own_imports(name, runtime_only=True)
        if target in RANK and target != unit_of(name)
    }
    mutual = sorted({tuple(sorted(edge)) for edge in edges if (edge[1], edge[0]) in edges})
    assert not mutual, mutual


def test_families_and_methods_never_meet() -> None:
    for name in modules():
        for one, other in (("families", "methods"), ("methods", "families")):
            if unit_of(name) == one:
                assert other not in {target for target, _ in own_imports(name)}, f"{name} imports {other}"


def test_extension_files_do_not_import_their_siblings_except_the_base() -> None:
    """A family must not need another family, only what `_`-files share; a control may share its method's edit."""
    for name in modules():
        if name.startswith("families.") and name != "families.base":
            siblings = {
                target
                for target, _ in imports_of(modules()[name])
                if target.startswith("ssmtune.families.")
                and not target.startswith(("ssmtune.families.base", "ssmtune.families._"))
            }
            assert not siblings, (name, siblings)


def test_nobody_imports_the_command_line() -> None:
    guilty = [n for n in modules() if unit_of(n) != "cli" and "cli" in {target for target, _ in own_imports(n)}]
    assert not guilty, guilty


def test_an_import_against_the_flow_would_be_seen(tmp_path: Path) -> None:
    """The reader above finds imports inside functions and leaves out those for types."""
    source = tmp_path / "planted.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ssmtune.plan import Plan\n"
        "def f():\n    import ssmtune.cli.main\n    from ssmtune import train\n"
    )
    assert [name for name, _ in imports_of(source, runtime_only=True)] == [
        "typing.TYPE_CHECKING",
        "ssmtune.cli.main",
        "ssmtune.train",
    ]
    assert "ssmtune.plan.Plan" in {name for name, _ in imports_of(source)}


LIGHT = (
    "ssmtune",
    "ssmtune.errors",
    "ssmtune.config",
    "ssmtune.records",
    "ssmtune.families.base",
    "ssmtune.methods.base",
    "ssmtune.methods.lora",
    "ssmtune.inventory",
    "ssmtune.probe",
    "ssmtune.placement",
    "ssmtune.plan",
    "ssmtune.models",
    "ssmtune.data",
    "ssmtune.training_data",
    "ssmtune.train",
    "ssmtune.tasks.base",
    "ssmtune.cli.main",
)
"""Loaded to print help, to read a config or to refuse one: nothing heavy may come with them."""

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_nothing_heavy(name: str) -> None:
    code = f"import sys, {name}; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [], f"importing {name} loads {result.stdout.strip()}"
