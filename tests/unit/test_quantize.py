"""Bases in 4 bits: what is chosen and why not, that nothing but the weights' values differs, and what the files say."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import (
    Case,
    assert_same_logits,
    logits_of,
    loss_of,
    randomise,
    tiny_config,
    tiny_model,
    tiny_tokens,
)
from invariants.micro import micro_run, save_micro_model, train_micro, write_examples
from tolerances import GRADIENTS_FP32, largest_difference
from torch import nn

from ssmtune.adapter_files import OUR_CONFIG
from ssmtune.attach import attach, load
from ssmtune.base_digest import base_digest
from ssmtune.config import decode
from ssmtune.errors import (
    AdapterMismatch,
    AttachError,
    ConfigError,
    MissingDependency,
    PlacementError,
    UnsupportedModel,
)
from ssmtune.merge import merge, merge_to
from ssmtune.models import load_config, load_model, weightless
from ssmtune.plan import make_plan
from ssmtune.quantize import bytes_table, choose, load_base, quantize, read_quantize
from ssmtune.quantized import QuantizationNote, QuantizeConfig, dense, is_quantized, quantized_of, scales_of
from ssmtune.recipe import Edit, Recipe
from ssmtune.verify import verify

GRANITE = Path(__file__).parents[2] / "benchmarks/shapes/granite-4.0-h-micro.json"
DENSE: Case = ("granite_hybrid", "dense")
CASES: tuple[Case, ...] = (
    DENSE,
    ("granite_hybrid", "odd"),
    ("falcon_h1", "norm-first"),
    ("mamba2", "tied"),
    ("qwen3_next", "moe"),
)
EVERYTHING = QuantizeConfig(components=("attention", "recurrent", "mlp"))
ROWS = Recipe(
    name="rows", edits=(Edit(method="lora", select=("ssm.in.x", "ssm.in.B"), options={"rank": 2, "alpha": 4.0}),)
)


def with_values_of(quantized: Any, plain: Any) -> Any:
    """`plain` with the values that the codes of `quantized` stand for."""
    values = {name: dense(p).detach() for name, p in quantized.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(values[name])
    return plain


def pair(case: Case, config: QuantizeConfig = EVERYTHING) -> tuple[Any, Any]:
    """A tiny model in 4 bits, and one in full precision with the same values."""
    quantized = quantize(tiny_model(case), config)
    return quantized, with_values_of(quantized, tiny_model(case))


def copy_trained(one: Any, other: Any) -> None:
    """Give `other` the trained values of `one`."""
    values = one.trained_parameters()
    with torch.no_grad():
        for name, parameter in other.trained_parameters().items():
            parameter.copy_(values[name])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_only_the_weights_values_differ(case: Case) -> None:
    """Forward and every gradient equal those of the dequantised weights, and the plan is that of the plain model."""
    original = dict(tiny_model(case).named_parameters())
    quantized, plain = pair(case)
    found = quantized_of(quantized)
    assert found is not None
    assert set(found.paths) == {name for name, p in quantized.named_parameters() if is_quantized(p)} != set()
    for name, parameter in quantized.named_parameters():
        same = torch.equal(dense(parameter), original[name])
        assert same != (name in found.paths), name
    plans = [make_plan(model, "all+core", rank=2) for model in (quantized, plain, tiny_model(case))]
    assert plans[0] == plans[1] == plans[2]
    tokens = tiny_tokens(case, 2, 11)
    assert_same_logits(logits_of(quantized, tokens), logits_of(plain, tokens), plain, tokens)
    adapted = [attach(model, plans[0]) for model in (quantized, plain)]
    randomise(adapted[0])
    copy_trained(*adapted)
    gradients = []
    for model in adapted:
        model.train()
        trained = model.trained_parameters()
        gradients.append(dict(zip(trained, torch.autograd.grad(loss_of(model, tokens), trained.values()), strict=True)))
    assert sum(p.numel() for p in adapted[0].trained_parameters().values()) == plans[0].trainable
    for name, expected in gradients[1].items():
        scale = expected.abs().max()
        assert scale > 0, name
        assert largest_difference(gradients[0][name] / scale, expected / scale) <= 10 * GRADIENTS_FP32, name


@pytest.mark.parametrize("recipe", [ROWS, "dora", "pissa"], ids=["rows", "dora", "pissa"])
def test_edits_of_the_tensor_itself(recipe: str | Recipe) -> None:
    """Row ranges, norms and singular vectors are taken of the values, and taking the edits off restores the codes."""
    options = {} if isinstance(recipe, Recipe) else {"rank": 2}
    name = "all" if recipe == "pissa" else recipe
    extra = {"init": "pissa"} if recipe == "pissa" else {}
    quantized, plain = pair(DENSE)
    before = copy.deepcopy(dict(quantized.named_parameters()))
    tokens = tiny_tokens(DENSE, 2, 11)
    plan = make_plan(quantized, name, **options, **extra)
    adapted, expected = attach(quantized, plan), attach(plain, plan)
    randomise(adapted)
    copy_trained(adapted, expected)
    found = logits_of(adapted, tokens)
    assert_same_logits(found, logits_of(expected, tokens), plain, tokens)
    with adapted.disable_adapter():
        assert largest_difference(logits_of(adapted, tokens), found) > 1e-2
    adapted.detach()
    for name, parameter in quantized.named_parameters():
        assert type(parameter) is type(before[name])
        assert torch.equal(parameter, before[name]), name
    base = expected.detach()
    for name, parameter in quantized.named_parameters():
        assert torch.equal(dense(parameter), base.get_parameter(name)), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("case", [DENSE, ("granite_hybrid", "odd")], ids="-".join)
def test_bytes_are_those_of_what_is_built(case: Case, double_quant: bool) -> None:
    config = QuantizeConfig(components=("attention", "recurrent", "mlp"), double_quant=double_quant)
    choices = {c.component.path: c for c in choose(weightless(tiny_config(case)), config)}
    for name, parameter in quantize(tiny_model(case), config).named_parameters():
        held = [parameter, *(scales_of(parameter).values() if is_quantized(parameter) else ())]
        assert sum(t.numel() * t.element_size() for t in held) == choices[name].bytes_after, name
        assert is_quantized(parameter) == (not choices[name].reason)


def test_the_default_leaves_what_follows_the_recurrence() -> None:
    rows = {row["role"]: row for row in bytes_table(choose(weightless(load_config(str(GRANITE))), QuantizeConfig()))}
    chosen = {role for role, row in rows.items() if row["quantized"]}
    assert chosen == {"ssm.in", "mlp.in", "mlp.out", "attn.q", "attn.k", "attn.v", "attn.o"}
    assert rows["ssm.out"]["reason"] == "not selected"
    assert sum(row["parameters"] for row in rows.values()) == 3_191_396_096


def reasons(case: Case, config: QuantizeConfig = EVERYTHING) -> dict[str, str]:
    return {row["role"]: row["reason"] for row in bytes_table(choose(weightless(tiny_config(case)), config))}


def test_what_a_group_cannot_have_in_four_bits_says_why() -> None:
    assert "past its module on path train" in reasons(("mamba", "tied"))["ssm.dt_proj"]
    moe = reasons(("granite_hybrid", "moe"))
    assert "packed experts" in moe["moe.experts.in"]
    assert "router" in moe["moe.router"]
    assert "small" in reasons(DENSE, QuantizeConfig(narrow=2))["attn.k"]
    assert reasons(DENSE, QuantizeConfig(without=("attn.q",)))["attn.q"] == "left out by 'without'"
    assert "several modules share it" in reasons(("zamba2", "shared")).values()


@pytest.mark.parametrize(
    ("case", "entry", "message"),
    [
        (("mamba", "tied"), "ssm.dt_proj", r"ssm\.dt_proj in layer 0 .*read past its module"),
        (("granite_hybrid", "moe"), "moe.experts.in", "packed experts"),
        (("granite_hybrid", "moe"), "moe.router", "decides which experts"),
        (DENSE, "conv", "never in 4 bits, since a convolution"),
        (DENSE, "ssm.conv", "cannot be in 4 bits: a convolution"),
        (DENSE, "embed.tokens", "decide every logit"),
        (DENSE, "ssm.in.x", r"names rows of model\.layers\.0\.mamba\.in_proj\.weight"),
        (DENSE, "ssm.inn", r"nearest: 'ssm\.in'"),
    ],
)
def test_a_role_that_cannot_be_in_four_bits_is_refused(case: Case, entry: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        choose(weightless(tiny_config(case)), QuantizeConfig(components=("mlp", entry)))


def test_nothing_to_quantise_and_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="nothing in this granitemoehybrid is quantised"):
        choose(weightless(tiny_config(DENSE)), QuantizeConfig(components=("attn.q",), without=("attention",)))
    with pytest.raises(ConfigError, match=r"'format': got 'fp4'"):
        decode(QuantizeConfig, {"format": "fp4"}, where="test")
    with pytest.raises(ConfigError, match="nearest: 'nf4'"):
        read_quantize("nf5")
    path = tmp_path / "four.yaml"
    path.write_text("components: [recurrent.out]\ndouble_quant: false\n")
    assert read_quantize(str(path)) == QuantizeConfig(components=("recurrent.out",), double_quant=False)


def test_without_bitsandbytes_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ssmtune\[quant\]'"):
        load_base("tiny-granite-h", quantize_config=QuantizeConfig())


def test_other_quantised_models_are_refused() -> None:
    """A checkpoint that says it is quantised, 4-bit layers of somebody else, and a second time."""
    from ssmtune.four_bit import quantize_linear

    config = tiny_config(DENSE)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModel, match=r"Load the original weights and give 'quantize'"):
        make_plan(weightless(config))
    model = tiny_model(DENSE)
    plan = make_plan(model, "all", rank=2)
    mixer = model.model.layers[0].mamba
    mixer.in_proj = quantize_linear(mixer.in_proj, EVERYTHING, model.device)
    with pytest.raises(AttachError, match=r"layers\.0\.mamba\.in_proj\.weight: is in 4 bits, and not by ssmtune"):
        attach(model, plan)
    with pytest.raises(AttachError, match="takes a plain model"):
        quantize(quantize(tiny_model(DENSE), EVERYTHING), EVERYTHING)


def test_an_adapter_says_what_it_was_trained_on(tmp_path: Path) -> None:
    quantized, plain = pair(DENSE)
    adapted = attach(quantized, make_plan(quantized, "all+core", rank=2))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "four")
    facts = json.loads((tmp_path / "four" / OUR_CONFIG).read_text())
    found = quantized_of(quantized)
    assert found is not None
    assert facts["quantization"] == json.loads(json.dumps(found.to_dict()))
    assert facts["base_digest"] == base_digest(tiny_model(DENSE)) == base_digest(quantized)

    tokens = tiny_tokens(DENSE, 2, 11)
    again = load(quantize(tiny_model(DENSE), EVERYTHING), tmp_path / "four")
    assert torch.equal(logits_of(again, tokens), logits_of(adapted, tokens))
    with pytest.warns(QuantizationNote, match=r"in 4 bits \(nf4, .* 14 tensors\); this one is in full precision"):
        full = load(tiny_model(DENSE), tmp_path / "four")
    with pytest.warns(QuantizationNote, match="12 tensors"):
        load(quantize(tiny_model(DENSE), QuantizeConfig()), tmp_path / "four")
    with pytest.raises(AdapterMismatch, match="has digest"):
        load(plain, tmp_path / "four")
    full.save_pretrained(tmp_path / "full")
    with pytest.warns(QuantizationNote, match="trained on a base in full precision"):
        load(quantize(tiny_model(DENSE), EVERYTHING), tmp_path / "full")

    facts["quantization"]["config"]["bits"] = 3
    (tmp_path / "four" / OUR_CONFIG).write_text(json.dumps(facts))
    with pytest.raises(AdapterMismatch, match="quantization: field 'bits'"):
        load(tiny_model(DENSE), tmp_path / "four")


def test_what_a_file_holds_is_put_together_again() -> None:
    from ssmtune.four_bit import pack, unpack

    model = quantize(tiny_model(DENSE), EVERYTHING)
    path = "model.layers.0.mamba.in_proj.weight"
    weight = model.get_parameter(path)
    parts = {f"{path}.{name}".rstrip("."): value.clone() for name, value in pack(weight).items()}
    again = unpack({**parts, "other": torch.ones(1)}, [path], "cpu")
    assert set(again) == {path, "other"}
    assert torch.equal(dense(again[path]), dense(weight))


def test_nothing_is_merged_into_four_bits() -> None:
    quantized, _ = pair(DENSE)
    before = {name: p.detach().clone() for name, p in quantized.named_parameters()}
    adapted = attach(quantized, make_plan(quantized, "all+core", rank=2))
    randomise(adapted)
    with pytest.raises(AttachError, match=r"held in 4 bits .*ssmtune merge RUN --out DIR"):
        merge(adapted)
    base = adapted.detach()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_evaluating_leaves_codes_and_biases_as_they_are() -> None:
    """bitsandbytes' own layer repacks codes when it evaluates on some CPUs, and changes the dtype of a bias in place."""
    model = quantize(tiny_model(("granite_hybrid", "odd")), EVERYTHING).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = tiny_tokens(("granite_hybrid", "odd"), 1, 9)
    first = logits_of(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model, tokens)
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype and torch.equal(p, before[name]), name
    assert torch.equal(logits_of(model, tokens), first)


def test_a_run_in_four_bits_trains_in_fp32_verifies_and_merges_into_the_original(tmp_path: Path) -> None:
    base = save_micro_model(tmp_path / "base")
    for name in ("train", "validation"):
        write_examples(tmp_path / f"{name}.jsonl")
    block = {"components": ["attention", "recurrent", "mlp"]}
    settings = micro_run(base, tmp_path, tmp_path / "run", max_steps=2, quantize=block)
    record = train_micro(settings)
    held = record["quantization"]
    assert list(held["config"]["components"]) == block["components"]
    assert held["bytes_after"] < held["bytes_before"]
    plain = train_micro(micro_run(base, tmp_path, tmp_path / "plain", max_steps=2))
    assert plain["quantization"] is None and "quantize" not in plain["config"]
    assert record["plan"] == plain["plan"]
    assert record["history"][0]["loss"] != plain["history"][0]["loss"]

    from ssmtune.adapter_files import read

    saved = read(tmp_path / "run" / "adapter")
    assert saved.quantized is not None and saved.quantized.digest == held["digest"]
    values = {**saved.peft_tensors, **saved.our_tensors}
    assert {value.dtype for value in values.values()} == {torch.float32}
    # Rounded to bf16 on the way, the last 16 bits of every value would be zero.
    assert all((value.view(torch.int32) & 0xFFFF).any() for value in values.values())

    report = verify(tmp_path / "run", checks=["coverage", "four_bits", "frozen", "merge", "moved"])
    assert report.ok, {name: c for name, c in report.checks.items() if not c.ok}
    assert "Merged into the original weights" in report.checks["merge"].detail
    assert "4-bit codes" in report.checks["frozen"].detail

    result = merge_to(str(tmp_path / "run"), tmp_path / "merged")
    prompts = result["quantization"]["prompts"]
    assert 1e-3 < prompts["mean"] < prompts["max"]
    assert "merged into the original weights" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.warns(QuantizationNote):
        expected = merge(load(load_model(str(base)), tmp_path / "run" / "adapter"))
    merged = load_model(str(tmp_path / "merged"))
    for name, p in merged.named_parameters():
        assert torch.equal(p, expected.get_parameter(name)), name
    assert all(type(m) is nn.Linear for m in merged.modules() if isinstance(m, nn.Linear))
