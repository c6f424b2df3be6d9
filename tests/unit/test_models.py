"""Loading what MODEL names: every damaged or missing file is a ConfigError that says which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from invariants.micro import save_micro_model

from ssmtune.errors import ConfigError
from ssmtune.models import BUNDLED, empty_model, load_config, load_model, load_tokenizer, model_location


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_micro_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def model_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_whole_directory_loads(saved: Path) -> None:
    model = load_model(str(saved), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.name_or_path == str(saved)
    assert load_tokenizer(str(saved)).chat_template
    empty = empty_model(str(saved))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    alone = empty_model(str(saved / "config.json")).config.to_dict()
    assert alone | {"_name_or_path": str(saved)} == empty.config.to_dict()


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent.json", "absent", "a/b/c"])
def test_missing_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model '{name}': no such file or directory"):
        load_model(name)


def test_misspelt_bundled_name_is_offered() -> None:
    with pytest.raises(ConfigError, match="nearest: 'tiny-granite-h'"):
        model_location("tiny-granit-h")
    for name in BUNDLED:
        assert Path(model_location(name)).is_dir()


def test_hub_id_without_network_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="model 'nobody/nothing': cannot be loaded: ") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("text", ["", '{"model_type": "granite', "[]", "null", "{}", '{"hidden_size": 3}'])
def test_truncated_or_foreign_config_is_refused(text: str, model_dir: Path) -> None:
    (model_dir / "config.json").write_text(text)
    for load in (load_config, load_model, empty_model):
        with pytest.raises(ConfigError, match=r"config\.json: is no model config"):
            load(str(model_dir))


def test_unknown_model_type_is_refused(model_dir: Path) -> None:
    (model_dir / "config.json").write_text('{"model_type": "mamba9"}')
    with pytest.raises(ConfigError, match="model_type 'mamba9' is unknown"):
        load_model(str(model_dir))


@pytest.mark.parametrize("field", [{"hidden_size": "wide"}, {"layer_types": ["sideways", "full_attention"]}])
def test_config_that_transformers_refuses(field: dict[str, object], model_dir: Path) -> None:
    facts = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(facts | field))
    with pytest.raises(ConfigError, match="refuses this config"):
        load_model(str(model_dir))


def test_config_alone_has_no_weights(saved: Path) -> None:
    with pytest.raises(ConfigError, match="config without weights"):
        load_model(str(saved / "config.json"))


def test_missing_weights_are_refused(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights cannot be loaded"):
        load_model(str(model_dir))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_weights_are_refused(share: float, model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    payload = path.read_bytes()
    path.write_bytes(payload[: int(share * len(payload))])
    with pytest.raises(ConfigError, match="weights cannot be loaded"):
        load_model(str(model_dir))


def test_pickled_weights_are_not_read(model_dir: Path) -> None:
    """Nothing is unpickled, even where a pickle is all there is."""
    (model_dir / "model.safetensors").unlink()
    torch.save(load_config(str(model_dir)).to_dict(), model_dir / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights cannot be loaded"):
        load_model(str(model_dir))


@pytest.mark.parametrize("change", ["missing", "reshaped"])
def test_weights_that_do_not_fit_the_config_are_refused(change: str, model_dir: Path) -> None:
    """A tensor that is missing would be drawn at random, and training would start from noise."""
    from safetensors.torch import load_file, save_file

    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.layers.0.mamba.out_proj.weight"]
    else:
        tensors["model.layers.0.mamba.D"] = torch.ones(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mamba"):
        load_model(str(model_dir))


def test_missing_tokenizer_is_refused(model_dir: Path) -> None:
    for path in model_dir.glob("tokenizer*"):
        path.unlink()
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(model_dir))


def test_truncated_tokenizer_is_refused(model_dir: Path) -> None:
    path = model_dir / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(model_dir))


def test_missing_chat_template_is_refused(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(str(model_dir))
