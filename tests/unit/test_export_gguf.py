"""GGUF: what is converted answers in llama.cpp as in transformers, and every fault on the way is seen."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Starcoder2Config

from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export import ExportConfig, _quantise, agreement, converter, export
from ssmtune.export.agreement import check_gguf
from ssmtune.export.config_words import restored_fields
from ssmtune.export.converter import convert, pre_type
from ssmtune.export.judgement import F32_LIMIT, KL_LIMITS
from ssmtune.export.tensor_types import q4_k_m_types
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


@pytest.mark.usefixtures("in_process")
def test_q4_k_m_answers_nearly_as_the_model(bundled_adapter: Path, gguf: Path, tmp_path: Path) -> None:
    """And the package gguf, which reads these types in code of its own, finds the weights in it."""
    out = tmp_path / "m.gguf"
    record = export(ExportConfig(run=str(bundled_adapter), to="gguf", out=str(out), type="q4_k_m"))
    assert record["check"]["ok"] and 1e-3 < record["check"]["mean_kl"] < KL_LIMITS["q4_k_m"]
    assert 0.03 < record["converter"]["largest_error"]["relative"] < 0.1
    assert record["converter"]["tensor_types"] == {"F32": 43, "Q4_K": 29, "Q6_K": 4}
    assert record["converter"]["fell_back"] == {} and record["converter"]["core_types"] == ["F32"]
    assert record["summary"][0] == "Tensors: 43 F32, 29 Q4_K, 4 Q6_K."
    assert out.stat().st_size < gguf.stat().st_size / 5
    wide, narrow = GGUFReader(gguf), {t.name: t for t in GGUFReader(out).tensors}
    assert [f for f in GGUFReader(out).fields if f not in wide.fields] == []
    embedding = next(t for t in wide.tensors if t.name == "token_embd.weight")
    found = dequantize(narrow["token_embd.weight"].data, narrow["token_embd.weight"].tensor_type)
    assert np.linalg.norm(found - embedding.data) < 0.03 * np.linalg.norm(embedding.data)


def test_quantised_rows_in_the_wrong_place_are_seen(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _quantise.Quantiser.__call__
    monkeypatch.setattr(_quantise.Quantiser, "__call__", lambda *given: np.roll(right(*given), 1, axis=0))
    with pytest.raises(ConfigError, match=r"what it made of .*weight is 1\.\d away from the weights"):
        _quantise.quantise(gguf, tmp_path / "wrong.gguf")


def _llama_shapes(num_layers: int, width: int) -> dict[str, list[int]]:
    parts = {"attn_norm": [width], "attn_q": [width, width], "attn_v": [width, width], "ffn_down": [3 * width, width]}
    layers = {f"blk.{i}.{part}.weight": shape for i in range(num_layers) for part, shape in parts.items()}
    return {"token_embd.weight": [width, 1000], "output.weight": [width, 1000], **layers}


def test_the_types_of_q4_k_m_are_those_of_llamacpp() -> None:
    """As in published files of Llama 2 7B: of 32 layers, 16 have more bits for values and for the end of the MLP."""
    types = q4_k_m_types(_llama_shapes(32, 512), num_layers=32, num_experts=0)
    more = [i for i in range(32) if types[f"blk.{i}.ffn_down.weight"][1].name == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [i for i in range(32) if types[f"blk.{i}.attn_v.weight"][1].name == "Q6_K"]
    assert all(types[f"blk.{i}.attn_q.weight"][1].name == "Q4_K" for i in range(32))
    assert (types["output.weight"][1].name, types["token_embd.weight"][1].name) == ("Q6_K", "Q4_K")
    assert not any("norm" in name for name in types)
    tied = _llama_shapes(1, 512)
    del tied["output.weight"]
    assert q4_k_m_types(tied, num_layers=1, num_experts=0)["token_embd.weight"][1].name == "Q6_K"


@pytest.mark.parametrize(("width", "expected"), [(64, ["Q5_0", "Q8_0"]), (100, ["F16", "F16"])])
def test_rows_that_blocks_do_not_divide_fall_back(width: int, expected: list[str]) -> None:
    types = q4_k_m_types(_llama_shapes(8, width), num_layers=8, num_experts=0)
    assert [types[name][1].name for name in ("blk.0.attn_q.weight", "blk.0.attn_v.weight")] == expected


def test_a_library_without_the_quantiser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec("xllamacpp.xllamacpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(ConfigError, match="no library here"):
        _quantise.Quantiser()
    other = importlib.machinery.ModuleSpec("other", None, origin=np._core._multiarray_umath.__file__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: other)
    with pytest.raises(ConfigError, match="cannot be called in .*ggml_quantize_chunk"):
        _quantise.Quantiser()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known)
    sizes = _quantise.GGML_QUANT_SIZES | {_quantise.Type.Q6_K: (256, 212)}
    monkeypatch.setattr(_quantise, "GGML_QUANT_SIZES", sizes)
    with pytest.raises(ConfigError, match=r"\('q6_k', 256, 210\) as type 14, the package gguf \('q6_k', 256, 212\)"):
        _quantise.Quantiser()


def _random_model(config: Any, directory: Path) -> Any:
    """Large random weights and the bundled tokenizer: logits steep enough to show a small error."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    load_tokenizer(BUNDLED).save_pretrained(directory)
    return model


@pytest.mark.usefixtures("in_process")
def test_gelu_from_a_table_is_told_from_a_wrong_weight(tmp_path: Path) -> None:
    """llama.cpp's table moves log-probabilities beyond the bound; everything but GELU is within it, or is not."""
    sizes = {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = _random_model(Starcoder2Config(**sizes, **heads, bos_token_id=1, eos_token_id=1), tmp_path / "model")
    path = tmp_path / "m.gguf"
    convert(tmp_path / "model", path, "f32")
    check = check_gguf(path, tmp_path / "model", type_="f32", prompts=PROMPT, num_tokens=4)
    assert check["ok"] and check["max_abs_logprob"] > F32_LIMIT > 10 * check["gelu_table"]["max_abs_without_gelu"]
    assert check["gelu_table"]["mean_abs_logprob"] < check["mean_abs_logprob"] / 10
    assert "table of half-precision values" in check["detail"]
    with torch.no_grad():
        model.model.layers[0].mlp.c_proj.bias[3] += 0.05
    model.save_pretrained(tmp_path / "model")
    wrong = check_gguf(path, tmp_path / "model", type_="f32", prompts=PROMPT, num_tokens=4)
    assert not wrong["ok"] and wrong["gelu_table"]["max_abs_without_gelu"] > F32_LIMIT


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("floor", "ok"), [(0.1, False), (1e-9, True)])
def test_bounds_of_dt_that_the_model_reaches_are_refused_by_name(floor: float, ok: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 6144, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "num_heads": 8}
    ends = {"head_dim": 16, "n_groups": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    _random_model(Mamba2Config(**sizes, **ends, time_step_limit=(floor, float("inf"))), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "m.gguf", "f16")
    check = check_gguf(tmp_path / "m.gguf", tmp_path / "model", type_="f16", prompts=PROMPT, num_tokens=2)
    assert check["ok"] is ok
    assert (check["dt_limits"]["max_abs_effect"] > F32_LIMIT) is not ok
    assert ok or "dt reaches the bounds" in check["detail"]


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


def test_layers_with_experts_before_those_without_are_refused() -> None:
    kimi = {
        "model_type": "kimi_linear",
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 3,
    }
    told = restored_fields(kimi)
    assert told["linear_attn_config"]["full_attn_layers"] == [2] and told["first_k_dense_replace"] == 1
    with pytest.raises(ConfigError, match="layers without experts before those with experts only"):
        restored_fields(kimi | {"mlp_layer_types": ["sparse", "dense"]})


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
