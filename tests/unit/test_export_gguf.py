"""GGUF: what is converted answers in llama.cpp as in transformers, and every fault on the way is seen."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export import ExportConfig, agreement, converter, export
from ssmtune.export.agreement import F32_LIMIT, check_gguf
from ssmtune.export.converter import convert, pre_type, restored_fields
from ssmtune.models import load_model, load_tokenizer, model_location

BUNDLED = "tiny-granite-h"
PROMPT = ["The river rose in the night, and"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in fp32, as `merge` writes one."""
    directory = tmp_path_factory.mktemp("model") / "model"
    load_model(BUNDLED, dtype="float32").save_pretrained(directory)
    load_tokenizer(BUNDLED).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gguf(model: Path) -> Path:
    path = model.parent / "model.gguf"
    convert(model, path, "f32")
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The children's work in this process, which has imported torch already: seconds for each of them."""

    def run(module: str, request: Path, failure: str) -> None:
        try:
            importlib.import_module(module).main(str(request))
        except NotImplementedError as error:
            raise ConfigError(f"{failure}: {error}") from None

    monkeypatch.setattr(converter, "run_child", run)
    monkeypatch.setattr(agreement, "run_child", run)


def test_export_answers_in_llamacpp_as_in_transformers(bundled_adapter: Path, tmp_path: Path) -> None:
    record = export(ExportConfig(run=str(bundled_adapter), to="gguf", out=str(tmp_path / "out"), type="f32"))
    check = record["check"]
    assert check["ok"] and check["max_abs_logprob"] <= F32_LIMIT
    assert check["same_top"] == check["prompts"] == 4
    assert check["same_chat"] is True
    assert record["converter"]["pre_type"] == "gpt-2"
    assert record["converter"]["core_types"] == ["F32"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model-f32.export.json", "model-f32.gguf"]
    assert json.loads((tmp_path / "out" / "model-f32.export.json").read_text())["check"] == check


@pytest.mark.usefixtures("in_process")
def test_a_model_that_answers_otherwise_is_seen(model: Path, gguf: Path, tmp_path: Path) -> None:
    """Planted: one D of one layer differs between the file and the model it is compared with."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mamba.D"][3] += 0.05
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert check_gguf(gguf, model, type_="f32", prompts=PROMPT, num_tokens=2)["ok"]
    check = check_gguf(gguf, other, type_="f32", prompts=PROMPT, num_tokens=2)
    assert not check["ok"] and check["max_abs_logprob"] > 2 * F32_LIMIT


@pytest.mark.usefixtures("in_process")
def test_a_tokenizer_that_splits_otherwise_is_seen_and_nothing_left(
    bundled_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "pre_type", lambda _: "qwen2")
    with pytest.raises(CheckFailed, match="not written. .*other tokens"):
        export(ExportConfig(run=str(bundled_adapter), to="gguf", out=str(tmp_path / "out"), type="f32"))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_renamed_layers_are_what_the_converter_stumbles_over(model: Path, tmp_path: Path) -> None:
    """Without the old names the file cannot be loaded; llama.cpp's own reason is passed on."""
    fields = json.loads((model / "config.json").read_text())
    assert restored_fields(fields)["layer_types"][:3] == ["mamba", "mamba", "attention"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(converter, "restored_fields", lambda _: {})
        convert(model, tmp_path / "wrong.gguf", "f32")
    with pytest.raises(ConfigError, match=r"tensor 'blk\.\d\.ssm_in.* not found"):
        check_gguf(tmp_path / "wrong.gguf", model, type_="f32", prompts=PROMPT, num_tokens=1)


def test_an_unknown_architecture_is_refused_in_the_converters_words(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"architectures": ["Zamba2ForCausalLM"]}))
    with pytest.raises(ConfigError, match="Zamba2ForCausalLM"):
        convert(other, tmp_path / "other.gguf", "f32")
    assert not (tmp_path / "other.gguf").exists()


def _write_tokenizer(directory: Path, pre_tokenizer: Any, *, ignore_merges: bool = False) -> Path:
    fields = {"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": ignore_merges}}
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    return directory


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "expected"),
    [
        ({"type": "ByteLevel", "use_regex": True}, False, "gpt-2"),
        (_split(converter.LLAMA3_SPLIT), True, "llama-bpe"),
        (_split(converter.LLAMA3_SPLIT), False, "dbrx"),
        (_split(converter.QWEN2_SPLIT), False, "qwen2"),
        (_split(converter.QWEN35_SPLIT), False, "qwen35"),
        (_split("a+"), False, None),
        ({"type": "Metaspace"}, False, None),
        (None, False, None),
    ],
)
def test_pre_types_follow_the_splitting_rule(
    pre_tokenizer: Any, ignore_merges: bool, expected: str | None, tmp_path: Path
) -> None:
    assert pre_type(_write_tokenizer(tmp_path, pre_tokenizer, ignore_merges=ignore_merges)) == expected


@pytest.mark.usefixtures("in_process")
def test_an_unknown_splitting_rule_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = _split(r"\w+|\W")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="pre-tokenizer was not recognized"):
        convert(other, tmp_path / "other.gguf", "f32")


def test_gated_delta_layers_out_of_step_are_refused() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention"]
    with pytest.raises(ConfigError, match="every n-th layer"):
        restored_fields({"model_type": "qwen3_next", "layer_types": kinds})
    regular = ["linear_attention", "linear_attention", "full_attention"] * 2
    assert restored_fields({"model_type": "qwen3_next", "layer_types": regular}) == {"full_attention_interval": 3}


def test_partial_rope_is_interleaved_within_its_part() -> None:
    """After the converter's interleaving of whole heads, rows 0..r pair up as halves of r, the rest stays in place."""
    from ssmtune.export._convert import interleave_for_partial_rope

    num_heads, head_dim, rotary_dim = 2, 8, 4
    rows = torch.arange(num_heads * head_dim, dtype=torch.float32)[:, None]
    prepared = interleave_for_partial_rope(rows, num_heads, rotary_dim)
    converted = prepared.reshape(num_heads, 2, head_dim // 2, 1).swapaxes(1, 2).reshape(-1)
    assert converted.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.usefixtures("in_process")
def test_the_bundled_model_can_be_checked_by_name(gguf: Path) -> None:
    """The call that ends the demo: chats as the model reads them, the same top token on each."""
    tokenizer = load_tokenizer(BUNDLED)
    chat = [{"role": "user", "content": "Is this a question?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    check = check_gguf(gguf, model_location(BUNDLED), type_="f32", prompts=[str(prompt)], num_tokens=1)
    assert check["ok"] and check["same_top"] == check["prompts"] == 1
