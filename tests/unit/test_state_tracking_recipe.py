"""The study of state tracking: its automata, its equal budgets, and a run of two steps."""

from __future__ import annotations

import dataclasses
import importlib.util
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmtune.errors import RecordError
from ssmtune.plan import make_plan
from ssmtune.recipe import Recipe
from ssmtune.records import read_record, write_json

ROOT = Path(__file__).parent.parent.parent


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("study_state_tracking", ROOT / "recipes/study_state_tracking.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


STUDY = _recipe()


def test_labels_are_the_states_that_the_inputs_lead_to() -> None:
    inputs, labels = STUDY.PARITY.batch(torch.Generator().manual_seed(0), 3, 20)
    assert torch.equal(labels, STUDY.FIRST_STATE + inputs.cumsum(1) % 2)
    automaton = STUDY.random_automaton(5)
    assert automaton.table.shape == (4, 3) and sorted(automaton.table[:, 0].tolist()) == [0, 1, 2, 3]
    inputs, labels = automaton.batch(torch.Generator().manual_seed(1), 2, 9)
    for row in range(2):
        state = 0
        for step in range(9):
            state = int(automaton.table[state, inputs[row, step]])
            assert labels[row, step] == STUDY.FIRST_STATE + state


def test_text_is_followed_by_its_next_byte(tmp_path: Path) -> None:
    path = tmp_path / "train-00.txt.xz"
    path.write_bytes(lzma.compress(bytes(range(200))))
    inputs, labels = STUDY.Text(STUDY.read_bytes(path, 150)).batch(torch.Generator().manual_seed(0), 4, 10)
    assert torch.equal(labels, inputs + 1) and inputs.max() < 150


def test_adapters_of_one_base_have_equal_counts() -> None:
    """Within a tenth of the smallest; each compared pair shares its base and what else trains."""
    counts: dict[str, list[int]] = {}
    arms = STUDY.arms(STUDY.StudyConfig().order)
    for arm in arms.values():
        model = STUDY.make_model(arm.base, 8, STUDY.StudyConfig().width)
        if arm.edits and not arm.scratch:
            plan = make_plan(model, Recipe(name="x", edits=arm.edits))
            counts.setdefault(arm.base, []).append(plan.trainable)
    assert set(counts) == {"transformer", "recurrent"}
    assert all(max(found) <= 1.1 * min(found) for found in counts.values()), counts
    for one, other in STUDY.COMPARISONS:
        assert arms[one].base == arms[other].base and arms[one].scratch == arms[other].scratch


def test_a_run_of_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(
        STUDY.StudyConfig(),
        seeds=(0, 1),
        num_steps=6,
        pretrain_steps=2,
        batch_rows=2,
        train_length=16,
        test_rows=4,
        scored_steps=4,
        width=16,
        order=4,
    )
    automaton = STUDY.PARITY.batch
    task = STUDY.Task(8, automaton, lambda seed: automaton, lambda seed: automaton, 2, 16, (16, 32), "accuracy")
    chosen = {name: STUDY.arms(4)[name] for name in ("hankel", "hankel-truncated", "lora")}
    cells = list(STUDY.run_task("parity", task, config, chosen, {}))
    assert len(cells) == 2 * (1 + len(chosen))
    truncated = [cell for cell in cells if cell["arm"] == "hankel-truncated"]
    assert all(len(cell["orders"]) == 2 and max(cell["orders"]) <= 4 for cell in truncated)
    summary = STUDY.summarise(cells, {"parity": task})
    assert {(c["arm"], c["baseline"]) for c in summary["comparisons"]} == {
        ("hankel", "lora"),
        ("hankel-truncated", "hankel"),
    }
    assert all(0 <= c["p_holm"] <= 1 and c["p_holm"] >= c["p"] for c in summary["comparisons"])
    write_json(tmp_path / "s.json.gz", STUDY.new_record("synthetic", config={}, cells=cells, **summary))
    assert len(read_record(tmp_path / "s.json.gz", kind="synthetic")["cells"]) == len(cells)
    assert "rate" in capsys.readouterr().out


def test_records_of_other_sizes_or_trees_are_not_kept(tmp_path: Path) -> None:
    path, config = tmp_path / "s.json.gz", dataclasses.asdict(STUDY.StudyConfig())
    record = STUDY.new_record("synthetic", config={**config, "tasks": ["dfa"], "arms": ["lora"]}, cells=[])
    record["environment"]["dirty"] = False
    write_json(path, record)
    assert [found["cells"] for found in STUDY.kept([path], config, ["lora"])] == [[]]
    for other, arms in ({**config, "width": 8}, ["lora"]), (config, ["hankel"]):
        with pytest.raises(RecordError, match="sizes, arms or sources"):
            STUDY.kept([path], other, arms)
    write_json(path, {**record, "environment": {**record["environment"], "code": "0"}})
    with pytest.raises(RecordError, match="sizes, arms or sources"):
        STUDY.kept([path], config, ["lora"])
    write_json(path, {**record, "environment": {**record["environment"], "dirty": True}})
    with pytest.raises(RecordError, match="clean"):
        STUDY.kept([path], config, ["lora"])
