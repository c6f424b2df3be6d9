"""LoRA adapters as GGUF files: llama.cpp applies every factor, and what it would ignore is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from ssmtune.attach import attach
from ssmtune.errors import CheckFailed, ConfigError
from ssmtune.export import ExportConfig, agreement, converter, export, gguf_lora
from ssmtune.export.factors import Factors
from ssmtune.export.judgement import F32_LIMIT
from ssmtune.models import load_model, load_tokenizer
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """The children's work in this process, which has imported torch already, and one prompt instead of four."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (converter, agreement):
            patch.setattr(module, "run_child", lambda name, request, _: importlib.import_module(name).main(request))
        check = agreement.check_gguf
        patch.setattr(
            gguf_lora, "check_gguf", lambda *a, **k: check(*a, prompts=["The river rose."], **{"num_tokens": 3, **k})
        )
        yield


def _qwen(directory: Path) -> str:
    """A model of gated delta layers whose value heads llama.cpp keeps in another order."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=6144,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    load_tokenizer("tiny-granite-h").save_pretrained(directory)
    return str(directory)


def _adapter(model: str, recipe: str, directory: Path) -> str:
    adapted = attach(load_model(model, dtype="float32"), make_plan(load_model(model), recipe, rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Attention and gated delta layers of the model, adapted."""
    directory = tmp_path_factory.mktemp("lora")
    return _adapter(_qwen(directory / "model"), "recurrent", directory / "adapter")


def test_llamacpp_applies_every_factor(adapter: str, tmp_path: Path) -> None:
    record = export(ExportConfig(run=adapter, to="gguf_lora", out=str(tmp_path / "out")))
    assert record["check"]["ok"] and record["check"]["max_abs_logprob"] <= F32_LIMIT
    assert record["tensors"] == [f"blk.0.{name}.weight" for name in ("attn_gate", "attn_qkv", "ssm_ba", "ssm_out")]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.export.json", "adapter.gguf"]


def test_factors_that_do_not_arrive_are_named_and_nothing_left(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the factors of one kind of tensor are written as zeros, as if llama.cpp ignored them."""
    write = gguf_lora.write_adapter

    def without_ssm_out(path: Path, base: Path, factors: dict[str, Factors]) -> str:
        changed = {n: (A, B * 0 if "ssm_out" in n else B, alpha) for n, (A, B, alpha) in factors.items()}
        return write(path, base, changed)

    monkeypatch.setattr(gguf_lora, "write_adapter", without_ssm_out)
    with pytest.raises(CheckFailed, match=r"not written.* ignores the adapter on ssm_out\."):
        export(ExportConfig(run=adapter, to="gguf_lora", out=str(tmp_path / "out")))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("recipe", "role"), [("all+core", "ssm.dt_bias"), ("norm", "norm.mixer")])
def test_what_llamacpp_would_ignore_is_refused_by_name(recipe: str, role: str, tmp_path: Path) -> None:
    run = _adapter("tiny-granite-h", recipe, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"{role}.* it would ignore them"):
        export(ExportConfig(run=run, to="gguf_lora", out=str(tmp_path / "out")))


def test_a_change_of_a_higher_rank_is_refused() -> None:
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CheckFailed, match="no longer of rank 3"):
        gguf_lora._factorise("blk.0.ffn_up.weight", matrix, 3)
    A_rI, B_Or, alpha = gguf_lora._factorise("blk.0.ffn_up.weight", matrix[:3].T @ matrix[:3], 5)
    assert A_rI.shape == (3, 12) and alpha == 3
    assert torch.allclose(B_Or @ A_rI, matrix[:3].T @ matrix[:3], atol=1e-5)


def test_adalora_arrives_as_the_triplets_that_are_left(adapter: str, tmp_path: Path) -> None:
    """Their weights lie in B, and what was pruned is in no factor."""
    recipe = Recipe(name="triplets", edits=(Edit(method="adalora", select=("attn.q", "gdn.out"), options={"rank": 3}),))
    model = load_model(str(Path(adapter).parent / "model"), dtype="float32")
    adapted = attach(model, make_plan(model, recipe))
    with torch.no_grad():
        for name, parameter in adapted.trained_parameters().items():
            if name.endswith("lora_lambda"):
                parameter.copy_(torch.tensor([1.0, 0.0, -0.5]))
    adapted.save_pretrained(tmp_path / "adapter")
    record = export(ExportConfig(run=str(tmp_path / "adapter"), to="gguf_lora", out=str(tmp_path / "out")))
    assert record["check"]["ok"] and record["check"]["max_abs_logprob"] <= F32_LIMIT
    assert record["tensors"] == ["blk.0.ssm_out.weight", "blk.1.attn_q.weight"]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in GGUFReader(tmp_path / "out" / "adapter.gguf").tensors}
    assert all(2 in shape for shape in shapes.values()), shapes
