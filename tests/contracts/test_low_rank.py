"""What low-rank methods can be told, on called modules, raw tensors, packed experts and rows of a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.tiny import Case, logits_of, loss_of, randomise, tiny_model, tiny_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import LOGITS_FP32, LOGITS_MERGED, largest_difference
from torch import nn

from ssmtune.attach import attach, load
from ssmtune.errors import ConfigError, PlacementError
from ssmtune.families.base import get_family
from ssmtune.merge import effective_tensors, merge
from ssmtune.methods._low_rank import Decomposed, LowRank, Scaled
from ssmtune.placement import named_recipe
from ssmtune.plan import make_plan
from ssmtune.recipe import Edit, Recipe

DENSE: Case = ("granite_hybrid", "dense")
MOE: Case = ("granite_hybrid", "moe")
RAW: Case = ("mamba", next(iter(get_family("mamba").tiny_configs())))
ALL = ("attention", "recurrent", "mlp")
SIZE = {"rank": 3, "alpha": 7.0}
VARIANTS: dict[str, tuple[Case, str, tuple[str, ...], dict[str, Any]]] = {
    "rs": (DENSE, "lora", ALL, {"scaling": "rs"}),
    "rs-experts": (MOE, "lora", ALL, {"scaling": "rs"}),
    "pissa": (DENSE, "lora", ALL, {"init": "pissa", "scaling": "rs"}),
    "pissa-rows": (DENSE, "lora", ("ssm.in.x", "ssm.in.dt"), {"init": "pissa", "dropout": 0.3}),
    "pissa-experts": (MOE, "lora", ALL, {"init": "pissa"}),
    "pissa-raw": (RAW, "lora", ("recurrent",), {"init": "pissa", "rank": 2}),
    "dora": (DENSE, "dora", ALL, {"scaling": "rs"}),
    "dora-rows": (DENSE, "dora", ("ssm.in.x", "ssm.in.dt"), {}),
    "dora-experts": (MOE, "dora", ("mlp",), {}),
    "dora-raw": (RAW, "dora", ("recurrent",), {}),
    "prodial": (RAW, "prodial", ("recurrent",), {}),
    "adalora": (DENSE, "adalora", ALL, {}),
    "adalora-rows": (DENSE, "adalora", ("ssm.in.x", "ssm.in.dt"), {}),
    "adalora-raw": (RAW, "adalora", ("recurrent",), {}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def adapted_to(variant: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Case]:
    case, method, roles, options = VARIANTS[variant]
    edits = tuple(
        Edit(method=method, select=(role,), options={**SIZE, **options}) for role in roles if usable(case, role)
    )
    model = tiny_model(case, dtype=dtype)
    return attach(model, make_plan(model, Recipe(name=variant, edits=edits))), case


def usable(case: Case, role: str) -> bool:
    return case != RAW or role == "recurrent"


@every_variant
def test_saved_loaded_merged_and_detached(variant: str, tmp_path: Path) -> None:
    adapted, case = adapted_to(variant)
    tokens = tiny_tokens(case, 2, 17)
    base = {name: value.clone() for name, value in tiny_model(case).state_dict().items()}
    expected = logits_of(tiny_model(case), tokens)
    adapted.train()  # dropout as well leaves the start alone
    assert largest_difference(logits_of(adapted, tokens), expected) <= LOGITS_FP32
    randomise(adapted.eval(), scale=0.03)
    moved = logits_of(adapted, tokens)
    assert largest_difference(moved, expected) > 10 * LOGITS_MERGED
    adapted.save_pretrained(tmp_path)
    loaded = load(tiny_model(case), tmp_path)
    assert torch.equal(logits_of(loaded, tokens), moved)
    detached = loaded.detach()
    assert all(torch.equal(value, base[name]) for name, value in detached.state_dict().items())
    assert largest_difference(logits_of(merge(adapted), tokens), moved) <= LOGITS_MERGED


def test_loaded_start_is_the_saved_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may take the singular vectors with other signs: what is subtracted is what was trained from."""
    adapted, case = adapted_to("pissa-rows")
    randomise(adapted.eval(), scale=0.03)
    tokens = tiny_tokens(case, 1, 9)
    expected = logits_of(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    svd = torch.linalg.svd

    def flipped(matrix: torch.Tensor, **options: Any) -> Any:
        U, S, Vh = svd(matrix, **options)
        return 2 * U, S, -Vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.equal(logits_of(load(tiny_model(case), tmp_path), tokens), expected)


@pytest.mark.parametrize("variant", ["pissa", "pissa-rows", "dora", "dora-rows", "prodial", "adalora-rows"])
def test_start_on_a_bf16_base_is_the_base(variant: str) -> None:
    """PEFT's own DoRA takes its norms in bf16 and starts elsewhere; the frozen part is never rounded."""
    adapted, case = adapted_to(variant, dtype=torch.bfloat16)
    tokens = tiny_tokens(case, 1, 9)
    on = logits_of(adapted.eval(), tokens)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, tokens), on)
    assert {p.dtype for p in adapted.trained_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("variant", ["pissa", "pissa-experts", "dora", "dora-raw"])
def test_training_moves_what_trains_and_nothing_else(variant: str) -> None:
    adapted, case = adapted_to(variant)
    trained = {id(p) for p in adapted.trained_parameters().values()}
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    constants = {name: value.clone() for name, value in adapted.edit_constants().items()}
    optimizer = torch.optim.AdamW(adapted.trained_parameters().values(), lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(adapted, tiny_tokens(case, 2, 9, seed=seed)).backward()
        optimizer.step()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) != (id(parameter) in trained), name
    assert constants.keys() == adapted.edit_constants().keys()
    assert all(torch.equal(value, adapted.edit_constants()[name]) for name, value in constants.items())


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_tensor_edit_is_pefts_layer(options: dict[str, Any]) -> None:
    """The same factors give the same effective weight: stock PEFT is the reference, its own switches on."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, bias=False)
    weight = linear.weight.detach().clone()
    peft = get_peft_model(
        nn.Sequential(linear), LoraConfig(r=3, lora_alpha=7.0, target_modules=["0"], **options)
    ).base_model.model[0]
    scale = 7.0 / 3**0.5 if "use_rslora" in options else 7.0 / 3
    edit: Any
    if "use_dora" in options:
        edit = Decomposed(weight, None, rank=3, scale=scale, dropout=0.0)
        factors = edit.product
    else:
        factors = edit = LowRank(
            weight, None, rank=3, scale=scale, dropout=0.0, principal="init_lora_weights" in options
        )
    with torch.no_grad():
        if "init_lora_weights" in options:
            product = factors.lora_B @ factors.lora_A
            assert torch.allclose(product, peft.lora_B["default"].weight @ peft.lora_A["default"].weight, atol=1e-5)
            noise = {"A": torch.randn(3, 12), "B": torch.randn(20, 3)}
            # Equal up to the sign of each singular pair, so both start from PEFT's.
            for letter in "AB":
                start = peft.get_submodule(f"lora_{letter}.default").weight.clone()
                getattr(factors, f"start_{letter}").copy_(start)
                getattr(factors, f"lora_{letter}").copy_(start + noise[letter])
                peft.get_submodule(f"lora_{letter}.default").weight.add_(noise[letter])
        else:
            peft.lora_B["default"].weight.normal_()
            factors.lora_A.copy_(peft.lora_A["default"].weight)
            factors.lora_B.copy_(peft.lora_B["default"].weight)
        if "use_dora" in options:
            peft.lora_magnitude_vector["default"].weight.mul_(1.5)
            edit.lora_magnitude.mul_(1.5)
    x = torch.eye(12)
    found, expected = x @ edit(weight).T, peft(x)
    assert largest_difference(found.detach(), expected.detach()) <= LOGITS_FP32
    if "init_lora_weights" not in options:
        probe = torch.randn(12, 20)
        (found * probe).sum().backward()
        (expected * probe).sum().backward()
        assert torch.allclose(factors.lora_A.grad, peft.lora_A["default"].weight.grad, atol=1e-4)
        assert torch.allclose(factors.lora_B.grad, peft.lora_B["default"].weight.grad, atol=1e-4)


def test_module_and_rows_of_all_give_equal_results() -> None:
    """PEFT's layer and the edit of the tensor are one method: the same factors, the same effective weight."""
    for method, options in (("lora", {"scaling": "rs"}), ("dora", {"scaling": "rs"})):
        edit = Edit(method=method, select=("ssm.out",), options={**SIZE, **options})
        model = tiny_model(DENSE)
        adapted = attach(model, make_plan(model, Recipe(name="one", edits=(edit,))))
        randomise(adapted)
        path, value = next(iter(effective_tensors(adapted).items()))
        layer = model.get_submodule(path.removesuffix(".weight"))
        weight = layer.base_layer.weight.detach()
        kinds = {"lora": LowRank, "dora": Decomposed}
        twin: Any = kinds[method](weight, ((0, len(weight)),), rank=3, scale=7.0 / 3**0.5, dropout=0.0)
        factors = twin.product if method == "dora" else twin
        with torch.no_grad():
            factors.lora_A.copy_(layer.lora_A["default"].weight)
            factors.lora_B.copy_(layer.lora_B["default"].weight)
            if method == "dora":
                twin.lora_magnitude.copy_(layer.lora_magnitude_vector["default"].weight[:, None])
        assert largest_difference(twin(weight).detach(), value) <= LOGITS_FP32


def test_stock_peft_loads_dora(tmp_path: Path) -> None:
    model = tiny_model(DENSE)
    adapted = attach(model, make_plan(model, "dora", rank=3)).eval()
    randomise(adapted)
    tokens = tiny_tokens(DENSE, 1, 9)
    expected = logits_of(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_model(DENSE), tmp_path).eval()
    assert largest_difference(logits_of(stock, tokens), expected) <= LOGITS_FP32


def test_blocks_of_prodial_are_the_formula() -> None:
    """s (W D) + scale B A, with D built out of its blocks, the last one cut, in fp64."""
    torch.manual_seed(0)
    weight = torch.randn(6, 10)
    edit = Scaled(weight, ((2, 5),), rank=2, scale=0.5, block=4)
    with torch.no_grad():
        for parameter in edit.trained().values():
            parameter.add_(torch.randn(parameter.shape))
    trained = {name: p.detach().double() for name, p in edit.trained().items()}
    D = torch.eye(10, dtype=torch.float64) - torch.block_diag(*trained["lora_blocks"], trained["lora_rest"])
    expected = weight.double().clone()
    expected[2:5] = trained["lora_scale"] * (weight[2:5].double() @ D) + 0.5 * trained["lora_B"] @ trained["lora_A"]
    assert largest_difference(edit(weight).detach(), expected) <= LOGITS_FP32
    assert torch.equal(edit(weight)[:2], weight[:2])


def test_dora_beside_lora_is_refused_where_peft_holds_both() -> None:
    edits = (Edit(method="dora", select=("attention",)), Edit(method="lora", select=("mlp",)))
    with pytest.raises(PlacementError, match="'dora' and 'lora'"):
        make_plan(tiny_model(DENSE), Recipe(name="mixed", edits=edits))
    rows = (Edit(method="dora", select=("ssm.in.x",)), Edit(method="lora", select=("mlp",)))
    assert make_plan(tiny_model(DENSE), Recipe(name="mixed", edits=rows)).trainable > 0


def test_pissa_with_too_high_a_rank_is_refused() -> None:
    with pytest.raises(PlacementError, match="200 singular directions"):
        make_plan(tiny_model(DENSE), "attention", rank=200, init="pissa")


def test_an_option_that_no_edit_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="init 'pissa': no edit of recipe 'dora'"):
        named_recipe("dora", init="pissa")


@pytest.mark.parametrize(
    ("case", "options", "words"),
    [
        (MOE, {}, "packs .* matrices"),
        (DENSE, {"target_rank": 13}, "target_rank 13 is above the initial rank 12"),
        (DENSE, {"initial_share": 0.6}, "leave no step"),
    ],
)
def test_what_adalora_cannot_do_is_refused(case: Case, options: dict[str, Any], words: str) -> None:
    recipe = Recipe(name="adaptive", edits=(Edit(method="adalora", select=ALL, options=options),))
    with pytest.raises(PlacementError, match=words):
        make_plan(tiny_model(case), recipe)
