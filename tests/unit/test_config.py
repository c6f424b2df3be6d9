"""Strict decoding: every mistake is named by file, path and nearest known word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmtune.config import decode, load_yaml, read_mapping
from ssmtune.errors import ConfigError, nearest
from ssmtune.recipe import Edit, Recipe
from ssmtune.train import OptimizerConfig, TrainConfig, to_settings
from ssmtune.training_data import DataConfig

RUN = {"model": "m", "output_dir": "out", "data": {"task": "classification"}}


def changed(**fields: Any) -> dict[str, Any]:
    return {**RUN, **fields}


def refusal(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        decode(TrainConfig, data, where="run.yaml")
    return str(caught.value)


def test_a_valid_mapping_is_decoded_with_defaults() -> None:
    config = decode(TrainConfig, changed(recipe="mlp", optimizer={"learning_rate": 1e-3}), where="run.yaml")
    assert config.recipe == "mlp" and config.data == DataConfig(task="classification")
    assert config.optimizer == OptimizerConfig(learning_rate=1e-3)


def test_unknown_field_names_the_nearest() -> None:
    message = refusal(changed(recpie="all"))
    assert message.startswith("run.yaml: unknown field 'recpie'") and "nearest: 'recipe'" in message


def test_unknown_nested_field_names_its_path_and_the_nearest_there() -> None:
    message = refusal(changed(optimizer={"learning_rat": 1e-3}))
    assert "unknown field 'optimizer.learning_rat'" in message
    assert "nearest: 'learning_rate'" in message
    assert "num_epochs" not in message, "a field of the outer config is no candidate"


@pytest.mark.parametrize(
    ("fields", "path", "value"),
    [
        ({"seed": "one"}, "seed", "'one'"),
        ({"num_epochs": -1}, "num_epochs", "-1"),
        ({"rows_per_step": 0}, "rows_per_step", "0"),
        ({"rows_per_step": 2.5}, "rows_per_step", "2.5"),
        ({"optimizer": {"clip": "both"}}, "optimizer.clip", "'both'"),
        ({"data": {"task": "classification", "size": 2}}, "data.size", "2"),
        ({"lora": {"rank": 0}}, "lora.rank", "0"),
        ({"dtype": "float8"}, "dtype", "'float8'"),
        ({"data": "classification"}, "data", "'classification'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_name_path_and_value(fields: dict[str, Any], path: str, value: str) -> None:
    message = refusal(changed(**fields))
    assert f"'{path}'" in message and value in message


@pytest.mark.parametrize("field", ["model", "output_dir", "data"])
def test_missing_field_is_named(field: str) -> None:
    assert f"field '{field}' is missing" in refusal({k: v for k, v in RUN.items() if k != field})


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(data: Any) -> None:
    assert "expected a mapping" in refusal(data)


def test_mistake_inside_a_recipe_in_full_names_its_place() -> None:
    edits = [{"method": "lora", "select": ["mlp"]}, {"method": "core", "selct": ["core"]}]
    message = refusal(changed(recipe={"name": "mine", "edits": edits}))
    assert "selct" in message and "'select'" in message


def test_keys_that_are_no_words_are_refused() -> None:
    """YAML reads `yes:` and `1:` as a boolean and a number."""
    assert "1" in refusal({**RUN, 1: "x"})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cut.json", '{"model": "m",\n "seed": ', "line 2: not valid JSON .*truncated"),
        ("cut.json", "", "not valid JSON"),
        ("bad.yaml", "model: m\n  seed: [1\n", "line [23]: not valid YAML"),
        ("list.yaml", "- a\n- b\n", "got list; expected a mapping"),
        ("empty.yaml", "", "got NoneType; expected a mapping"),
        ("tag.yaml", "model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_damaged_files_are_refused(name: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_mapping(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_mapping(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_mapping(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("näme: x".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_mapping(tmp_path / "latin.yaml")


def test_file_name_is_part_of_a_field_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\noutput_dir: o\ndata: {tsak: rules}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown field 'data\.tsak'; nearest: 'task'"):
        load_yaml(TrainConfig, tmp_path / "run.yaml")


names = st.sampled_from(["lora", "core"])
edits = st.builds(
    Edit,
    method=names,
    select=st.lists(st.sampled_from(["attention", "mlp", "core"]), max_size=3).map(tuple),
    layers=st.none() | st.lists(st.integers(0, 50), max_size=3).map(tuple),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)


@given(st.lists(edits, max_size=3).map(tuple), st.integers(0, 100), st.floats(1e-6, 1))
def test_configs_survive_a_round_trip(chosen: tuple[Edit, ...], seed: int, rate: float) -> None:
    """What a record keeps of a run decodes to the same run."""
    config = TrainConfig(
        model="m",
        output_dir="o",
        data=DataConfig(task="rules"),
        recipe=Recipe(name="r", edits=chosen),
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=rate),
    )
    assert decode(TrainConfig, to_settings(config) | {"output_dir": "o"}, where="test") == config


def test_nearest_offers_all_when_nothing_is_close() -> None:
    assert nearest("zzz", ["mlp", "all"]) == "known: 'all', 'mlp'"
    assert nearest("al", ["mlp", "all"]) == "nearest: 'all'"
