"""Rewritten layers against the model's own: logits and every gradient, packed, padded, cached, recomputed, switched off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import move, tiny_config, tiny_model
from tolerances import BF16_ROUND_ONCE, OP_FP32, relative_rms
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, DynamicCache

import ssmtune
from ssmtune.discovery import module_names
from ssmtune.errors import AttachError
from ssmtune.families.base import get_family
from ssmtune.fast import _linear, _mamba2
from ssmtune.head_loss import HeadLoss, head_on
from ssmtune.memory import keep_activations
from ssmtune.ops.mamba2_mixer import mamba2_mixer
from ssmtune.quantize import quantize
from ssmtune.quantized import QuantizeConfig, dense

FAMILIES = module_names("ssmtune.fast")
CASES = [(family, name) for family in FAMILIES for name in get_family(family).tiny_configs()]

FOUR_BITS = QuantizeConfig(components=("attention", "recurrent", "mlp"))
# One config of each family of which every layer is rewritten.
SERVED = [
    ("bamba", "tied"),
    ("falcon_h1", "no-norm"),
    ("granite_hybrid", "dense"),
    ("mamba2", "tied"),
    ("nemotron_h", "dense"),
]

# Sums in another order over a few layers.
LIMIT = 20 * OP_FP32

Results = dict[str, torch.Tensor]


def adapted_model(
    case: tuple[str, str], *, fast: bool, recipe: str = "all+core", four_bits: bool = False
) -> ssmtune.AdaptedModel:
    """A tiny model whose adapters do something; with `four_bits` over projections that are all held in 4 bits."""
    model = tiny_model(case)
    if four_bits:
        quantize(model, FOUR_BITS)
    adapted = ssmtune.attach(model, ssmtune.make_plan(model, recipe=recipe), fast="off")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapted.trained_parameters().items()):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if fast:
        adapted.use_fast_layers()
    return adapted.train()


def inputs(adapted: ssmtune.AdaptedModel, kind: str) -> dict[str, Any]:
    """Two rows of tokens: plain, as packed documents, or with padding."""
    ids = torch.randint(3, adapted.config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(2))
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if kind == "packed":
        given["position_ids"] = torch.cat([torch.arange(9), torch.arange(14)]).expand(2, -1)
    if kind == "padded":
        given["attention_mask"] = torch.ones(2, 23, dtype=torch.long).index_fill(1, torch.arange(4), 0)
    return given


def results(adapted: ssmtune.AdaptedModel, given: dict[str, Any]) -> Results:
    """Logits at real tokens, and the gradient of every trained tensor under a fixed random loss."""
    logits = adapted(**given).logits
    if "attention_mask" in given:
        logits = logits * given["attention_mask"][..., None]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    parameters = adapted.trained_parameters()
    gradients = torch.autograd.grad((logits * weight).sum(), list(parameters.values()))
    return {"logits": logits.detach(), **dict(zip(parameters, gradients, strict=True))}


def worst(found: Results, expected: Results) -> float:
    assert found.keys() == expected.keys()
    return max(relative_rms(found[name], expected[name]) for name in expected)


def is_served(adapted: ssmtune.AdaptedModel) -> bool:
    return adapted.use_fast_layers().num_blocks > 0


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_equal_to_the_models_own_layers(case: tuple[str, str], kind: str) -> None:
    own, fast = adapted_model(case, fast=False), adapted_model(case, fast=True)
    assert worst(results(fast, inputs(fast, kind)), results(own, inputs(own, kind))) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_served_layers(family: str) -> None:
    """Some config of each family is rewritten whole, and a config that is not says why."""
    described = {}
    for name in get_family(family).tiny_configs():
        layers = adapted_model((family, name), fast=False).use_fast_layers()
        assert layers.num_blocks + len(layers.reasons) == layers.num_layers
        described[name] = layers.reasons
    assert any(not reasons for reasons in described.values()), described


def test_every_family_has_its_case_in_4_bits() -> None:
    assert [family for family, _ in SERVED] == sorted(FAMILIES)


@pytest.mark.parametrize(
    ("case", "recipe"),
    # With projections that carry no adapter as well.
    [*((case, "all+core") for case in SERVED), (("granite_hybrid", "dense"), "attention")],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_base_in_4_bits(case: tuple[str, str], recipe: str) -> None:
    """Every layer is rewritten, and equals the model's own over the same codes; so with the adapters switched off."""
    own = adapted_model(case, fast=False, recipe=recipe, four_bits=True)
    fast = adapted_model(case, fast=True, recipe=recipe, four_bits=True)
    assert fast.quantized is not None and not fast.fast_layers.reasons
    given = inputs(fast, "packed")
    assert worst(results(fast, given), results(own, given)) <= LIMIT
    with torch.no_grad(), fast.disable_adapter(), own.disable_adapter():
        assert relative_rms(fast(**given).logits, own(**given).logits) <= LIMIT


@pytest.mark.parametrize("case", SERVED, ids="-".join)
def test_no_values_of_4_bit_weights_wait_for_the_backward_pass(
    case: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight is unpacked once forward and again backward, and its values are gone when the product is done."""
    unpacked: list[StorageWeakRef] = []

    def watched(weight: torch.Tensor) -> torch.Tensor:
        assert all(values.expired() for values in unpacked)
        values = dense(weight)
        unpacked.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(_linear, "dense", watched)
    adapted = adapted_model(case, fast=True, four_bits=True)
    assert adapted.quantized is not None
    num_weights = len(adapted.quantized.paths)
    logits = adapted(**inputs(adapted, "packed")).logits
    assert len(unpacked) == num_weights
    assert all(values.expired() for values in unpacked)
    logits.sum().backward()
    assert all(values.expired() for values in unpacked)
    # What reads the embeddings needs no gradient of its input: the first layer's projections up to its first output.
    assert 2 * num_weights - 4 <= len(unpacked) < 2 * num_weights


def test_a_base_that_is_cast_after_it_was_put_in_4_bits() -> None:
    """Its codes stand for fp32, its activations are bf16: values are unpacked to what they are multiplied by."""
    logits = {}
    for fast, dtype in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)):
        adapted = adapted_model(("granite_hybrid", "dense"), fast=False, four_bits=True).to(dtype)
        for parameter in adapted.trained_parameters().values():
            parameter.data = parameter.data.float()
        if fast:
            assert not adapted.use_fast_layers().reasons
        found = adapted(**inputs(adapted, "packed")).logits
        found.float().sum().backward()
        logits[fast, dtype] = found.detach().float()
    exact = logits.pop((False, torch.float32))
    own, found = (relative_rms(value, exact) for value in logits.values())
    assert 0 < found <= 2 * own


def test_what_is_not_served_in_4_bits_says_why() -> None:
    adapted = adapted_model(("granite_hybrid", "dense"), fast=True, recipe="dora", four_bits=True)
    assert "carries something else than one plain LoRA" in adapted.fast_block
    own = adapted_model(("granite_hybrid", "dense"), fast=False, recipe="dora", four_bits=True)
    assert worst(results(adapted, inputs(adapted, "packed")), results(own, inputs(own, "packed"))) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same(family: str) -> None:
    case = (family, next(iter(get_family(family).tiny_configs())))
    kept = adapted_model(case, fast=True)
    expected = results(kept, inputs(kept, "packed"))
    small = adapted_model(case, fast=True)
    keep_activations(small, "small")
    runs = count_runs(small)
    found = results(small, inputs(small, "packed"))
    assert worst(found, expected) <= OP_FP32
    # Once forward, once more in the backward pass.
    assert set(runs.values()) == {2}


def count_runs(adapted: ssmtune.AdaptedModel) -> dict[str, int]:
    """How often each rewritten layer's input norm or projection is computed, by layer: counted inside the layer."""
    runs: dict[str, int] = {}
    for name, module in adapted.get_base_model().named_modules():
        factors = vars(module).get(_linear.ATTRIBUTE)
        if factors is None:
            continue
        counted = factors.low_rank

        def low_rank(name: str = name, counted: Any = counted) -> Any:
            runs[name] = runs.get(name, 0) + 1
            return counted()

        factors.low_rank = low_rank
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_beside_a_cache_the_models_own_forward_runs(family: str) -> None:
    """Token by token with a cache gives what the rewritten layers give for the whole sequence."""
    case = (family, next(iter(get_family(family).tiny_configs())))
    adapted = adapted_model(case, fast=True).eval()
    ids = inputs(adapted, "plain")["input_ids"]
    whole = adapted(input_ids=ids, use_cache=False).logits
    name = get_family(family).cache
    cache, logits = DynamicCache(config=adapted.config), []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            logits.append(adapted(input_ids=ids[:, t : t + 1], **{name: cache}, use_cache=True).logits)
    assert relative_rms(torch.cat(logits, 1), whole.detach()) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_and_detached(family: str) -> None:
    case = (family, next(iter(get_family(family).tiny_configs())))
    adapted = adapted_model(case, fast=True)
    given = inputs(adapted, "plain")
    base = tiny_model(case).train()
    with adapted.disable_adapter(), torch.no_grad():
        off = adapted(**given).logits
    assert relative_rms(off, base(**given).logits.detach()) <= LIMIT
    detached = adapted.detach()
    assert not any("forward" in vars(module) for module in detached.modules())
    assert torch.equal(detached(**given).logits, base(**given).logits)


def test_a_residual_stream_in_fp32_is_served_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the layers' weights are in autocast's dtype, and what passes between the layers is not."""
    served: list[torch.dtype] = []

    def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        served.append(x.dtype)
        return mamba2_mixer(x, *args, **kwargs)

    monkeypatch.setattr(_mamba2, "mamba2_mixer", watched)
    config = tiny_config(("mamba2", "tied"))
    assert config.residual_in_fp32 and config.num_hidden_layers > 1
    every_layer = [torch.bfloat16] * config.num_hidden_layers
    for dtype, four_bits, expected in (
        (torch.bfloat16, False, every_layer),
        (torch.bfloat16, True, every_layer),
        # A model in fp32, whose products autocast would round, keeps its own layers, whatever its weights are held in.
        (torch.float32, False, []),
        (torch.float32, True, []),
    ):
        served.clear()
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if four_bits:
            quantize(model, FOUR_BITS)
        adapted = ssmtune.attach(model, ssmtune.make_plan(model, recipe="all+core"), fast="require").train()
        with torch.autocast("cpu", torch.bfloat16):
            adapted(**inputs(adapted, "plain"))
        assert served == expected


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_projection_beside_rewritten_layers_under_autocast(four_bits: bool) -> None:
    """It is called by itself, by a layer that keeps the model's own forward, with inputs in fp32."""
    model = tiny_model(("granite_hybrid", "moe"), dtype=torch.bfloat16)
    if four_bits:
        quantize(model, FOUR_BITS)
    adapted = ssmtune.attach(model, ssmtune.make_plan(model, recipe="attention"), fast="off")
    move(adapted.trained_parameters(), scale=0.3)
    assert adapted.use_fast_layers().num_blocks == 0
    projections = [m for m in adapted.modules() if _linear.ATTRIBUTE in vars(m)]
    assert projections
    for projection in projections:
        x = torch.randn(2, 5, projection.in_features, generator=torch.Generator().manual_seed(4))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found, expected = projection(x), type(projection).forward(projection, x)
        assert found.dtype == expected.dtype == torch.bfloat16
        # The products with the weight, with A and with B, and their sum.
        assert relative_rms(found, expected) <= 4 * BF16_ROUND_ONCE


def test_factors_follow_what_is_written_to_them() -> None:
    """Rounded copies of the factors are never older than the factors, whoever writes them."""
    adapted = adapted_model(("granite_hybrid", "dense"), fast=True)
    given = inputs(adapted, "plain")
    before = adapted(**given).logits.detach()
    with torch.no_grad():
        for parameter in adapted.trained_parameters().values():
            parameter.mul_(2.0)
    own = adapted_model(("granite_hybrid", "dense"), fast=False)
    with torch.no_grad():
        for parameter in own.trained_parameters().values():
            parameter.mul_(2.0)
    after = adapted(**given).logits.detach()
    assert relative_rms(after, before) > 1e-3
    assert relative_rms(after, own(**given).logits.detach()) <= LIMIT


@pytest.mark.parametrize("four_bits", [False, True])
def test_rounded_copies_end_with_what_they_copy(four_bits: bool) -> None:
    adapted = adapted_model(("granite_hybrid", "dense"), fast=True, four_bits=four_bits)
    adapted(**inputs(adapted, "plain"))
    factors = [vars(m)[_linear.ATTRIBUTE] for m in adapted.modules() if _linear.ATTRIBUTE in vars(m)]
    assert factors
    for one in factors:
        A, B, scale, _, rounded = one.low_rank()
        assert rounded is not None
        assert torch.equal(rounded[0], A) and torch.equal(rounded[1], B * scale)
        with torch.no_grad():
            B.add_(1.0)
        assert one.low_rank().rounded is None


@pytest.mark.parametrize("recipe", ["dora", "hankel", "bitfit", "affix"])
def test_other_methods_keep_the_models_own_layers(recipe: str) -> None:
    adapted = adapted_model(("granite_hybrid", "dense"), fast=True, recipe=recipe)
    assert "method" in adapted.fast_block or "plain LoRA" in adapted.fast_block
    own = adapted_model(("granite_hybrid", "dense"), fast=False, recipe=recipe)
    assert worst(results(adapted, inputs(adapted, "packed")), results(own, inputs(own, "packed"))) <= LIMIT


def test_require_raises_with_the_reason() -> None:
    model = tiny_model(("granite_hybrid", "moe"))
    with pytest.raises(AttachError, match="2 of 2 layers keep .* it has routed experts"):
        ssmtune.attach(model, ssmtune.make_plan(model, recipe="attention"), fast="require")
    assert not any("forward" in vars(module) for module in model.modules())
    served = tiny_model(("granite_hybrid", "dense"))
    adapted = ssmtune.attach(served, ssmtune.make_plan(served, recipe="all"), fast="require")
    assert adapted.fast_block.startswith("3 of 3 layers rewritten")


@pytest.fixture(params=[("granite_hybrid", "dense"), ("falcon_h1", "no-norm"), ("gemma", "dense")], ids="-".join)
def model_with_head(request: pytest.FixtureRequest) -> Iterator[ssmtune.AdaptedModel]:
    family, name = request.param
    configs = get_family(family).tiny_configs()
    yield adapted_model((family, name if name in configs else next(iter(configs))), fast=False, recipe="all")


def test_loss_without_logits(model_with_head: ssmtune.AdaptedModel) -> None:
    """The loss and its gradients equal those through the model's own head, whatever scale its logits have."""
    adapted = model_with_head
    given = {"input_ids": inputs(adapted, "plain")["input_ids"]}
    positions = torch.tensor([0, 3, 7, 24, 40])
    targets = torch.tensor([5, 1, 9, 4, 2])
    bypassed = HeadLoss(adapted, bypass=True)
    assert bypassed.reason is None
    parameters = list(adapted.trained_parameters().values())
    found, expected = [], []
    for loss, into in ((bypassed, found), (HeadLoss(adapted), expected)):
        total = loss(adapted, given, positions, targets)
        into.extend([total.detach(), *torch.autograd.grad(total, parameters)])
    assert max(relative_rms(a, b) for a, b in zip(found, expected, strict=True)) <= LIMIT


def test_a_head_with_a_cap_is_run_as_it_stands() -> None:
    configs = get_family("recurrent_gemma").tiny_configs()
    adapted = adapted_model(("recurrent_gemma", next(iter(configs))), fast=False, recipe="all")
    loss = HeadLoss(adapted, bypass=True)
    assert loss.reason == "the model does more to its logits than scale them"
    given = {"input_ids": inputs(adapted, "plain")["input_ids"]}
    positions, targets = torch.tensor([0, 5]), torch.tensor([3, 4])
    with head_on(adapted, positions):
        logits = adapted(**given, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert torch.equal(loss(adapted, given, positions, targets), expected)


def test_the_loss_without_logits_counts_as_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations run outside of every module: a profile must not lose them."""
    from ssmtune import head_loss
    from ssmtune.bench_profile import component_modules, profile_step
    from ssmtune.inventory import take_inventory

    model = tiny_model(("granite_hybrid", "dense"))
    modules = component_modules(model, take_inventory(model))
    adapted = ssmtune.attach(model, ssmtune.make_plan(model, recipe="all"), fast="off")
    loss = HeadLoss(adapted, bypass=True)
    large = torch.ones(1500, 1500)

    def slow(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return hidden.sum() * (large @ large).mean()

    monkeypatch.setattr(head_loss, "linear_cross_entropy", slow)
    given = {"input_ids": inputs(adapted, "plain")["input_ids"]}
    positions, targets = torch.arange(40), torch.full((40,), 3)
    shares, _ = profile_step(lambda: loss(adapted, given, positions, targets).backward(), modules, with_cuda=False)
    # The product alone takes far longer than this model of 32 channels.
    assert shares["head and loss"] > 0.5
