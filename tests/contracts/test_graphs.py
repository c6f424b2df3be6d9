"""Replayed passes against passes that run as always, on a tape that does the same work on the same memory again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import DynamicCache

import ssmtune
from ssmtune import graphs as graphs_module
from ssmtune.graphs import EAGER_PASSES, MAX_SHAPES, Graphs, use_graphs
from ssmtune.memory import keep_activations
from ssmtune.quantize import quantize
from ssmtune.quantized import QuantizeConfig

Results = dict[str, torch.Tensor]
FAMILIES = [
    ("granite_hybrid", "dense"),
    ("falcon_h1", "no-norm"),
    ("mamba2", "tied"),
    ("bamba", "tied"),
    ("nemotron_h", "dense"),
]


class Tape(TorchDispatchMode):
    """Notes every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do it all again, each result into the memory of the first time; what is a view or in place is there already."""
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for new, old in zip(tree_flatten(func(*args, **kwargs))[0], tree_flatten(result)[0], strict=True):
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class TapeRecorder:
    """Stands in for CUDA graphs."""

    def __init__(self) -> None:
        self.num = 0

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.num += 1
        with Tape() as tape:
            result = run()
        return result, tape.replay


def adapted_model(
    case: tuple[str, str] = FAMILIES[0], recipe: str = "all+core", four_bits: bool = False, **options: Any
) -> Any:
    model = tiny_model(case)
    if four_bits:
        quantize(model, QuantizeConfig(components=("attention", "recurrent", "mlp")))
    adapted = ssmtune.attach(model, ssmtune.make_plan(model, recipe=recipe, **options), fast="off")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(adapted.trained_parameters().items()):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapted.use_fast_layers()
    return adapted.train()


def batch(number: int, length: int = 12) -> dict[str, torch.Tensor]:
    """Tokens, and documents that end elsewhere in every batch."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(number))
    first = 3 + number % 5
    positions = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions}


def loss_of(adapted: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = adapted(**given, use_cache=False).logits
    weight = torch.linspace(-1, 1, logits[0].numel()).view(logits.shape[1:])
    loss: torch.Tensor = (logits * weight).sum()
    return loss


def take_steps(adapted: Any, batches: list[dict[str, torch.Tensor]]) -> list[Results]:
    """Losses and gradients of a few steps that move the parameters."""
    found = []
    parameters = adapted.trained_parameters()
    for given in batches:
        loss = loss_of(adapted, given)
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in parameters.items()}})
        with torch.no_grad():
            for p in parameters.values():
                p -= 1e-3 * p.grad
                p.grad = None
    return found


def assert_equal(found: list[Results], expected: list[Results]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def recorded(case: tuple[str, str] = FAMILIES[0]) -> tuple[Any, Graphs]:
    """A model whose first shape is recorded."""
    adapted = adapted_model(case)
    graphs = use_graphs(adapted, recorder=TapeRecorder())
    for number in range(EAGER_PASSES + 1):
        loss_of(adapted, batch(number)).backward()
    adapted.zero_grad(set_to_none=True)
    assert graphs.num_replayed == 1 and len(graphs.recordings) == 1
    return adapted, graphs


@pytest.mark.parametrize(
    ("case", "four_bits"), [*((case, False) for case in FAMILIES), (FAMILIES[0], True), (FAMILIES[1], True)]
)
def test_replayed_steps_equal_steps_that_run_as_always(case: tuple[str, str], four_bits: bool) -> None:
    """Also where a base in 4 bits is unpacked within the recording, over and over in the same memory."""
    batches = [batch(number) for number in range(6)]
    adapted = adapted_model(case, four_bits=four_bits)
    graphs = use_graphs(adapted, recorder=TapeRecorder())
    found = take_steps(adapted, batches)
    assert graphs.refusal is None, graphs.refusal
    assert graphs.num_replayed == len(batches) - EAGER_PASSES
    assert_equal(found, take_steps(adapted_model(case, four_bits=four_bits), batches))


def test_accumulated_gradients_are_sums() -> None:
    adapted, graphs = recorded()
    plain = adapted_model()
    for model in (adapted, plain):
        for number in range(3):
            loss_of(model, batch(number)).backward()
    assert graphs.num_replayed == 4
    for name, p in plain.trained_parameters().items():
        assert torch.equal(adapted.trained_parameters()[name].grad, p.grad), name


def test_a_pass_before_the_last_ones_backward_runs_as_always() -> None:
    adapted, graphs = recorded()
    plain = adapted_model()
    for model in (adapted, plain):
        first, second = loss_of(model, batch(1)), loss_of(model, batch(2))
        (first + 2 * second).backward()
    assert graphs.eager["another pass's backward is still to come"] == 1
    for name, p in plain.trained_parameters().items():
        assert torch.equal(adapted.trained_parameters()[name].grad, p.grad), name


def test_a_loss_that_nobody_follows_back_blocks_nothing() -> None:
    adapted, graphs = recorded()
    for number in range(3):
        loss_of(adapted, batch(number))
    assert graphs.num_replayed == 4


def test_backward_through_what_was_overwritten_is_an_error() -> None:
    adapted, _ = recorded()
    loss = loss_of(adapted, batch(1))
    loss.backward(retain_graph=True)
    loss_of(adapted, batch(2)).backward()
    with pytest.raises(RuntimeError, match="overwritten by a later one"):
        loss.backward()


def test_a_second_backward_of_the_same_pass_gives_the_same() -> None:
    adapted, _ = recorded()
    loss = loss_of(adapted, batch(1))
    parameters = list(adapted.trained_parameters().values())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True))


def test_what_was_handed_out_outlives_the_next_pass() -> None:
    adapted, graphs = recorded()
    backbone = adapted.get_base_model().base_model
    parameters = list(adapted.trained_parameters().values())

    def run(number: int) -> list[torch.Tensor]:
        hidden = backbone(**batch(number), use_cache=False).last_hidden_state
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), parameters, allow_unused=True)]

    # What calls the backbone alone hands it other arguments than the model does: a shape of its own.
    for number in range(EAGER_PASSES):
        run(number)
    first = run(1)
    copies = [tensor.clone() for tensor in first]
    run(2)
    assert graphs.num_replayed == 3
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(first, copies, strict=True))


def test_without_gradients_and_in_evaluation_nothing_is_replayed() -> None:
    adapted, graphs = recorded()
    with torch.no_grad():
        loss_of(adapted, batch(1))
    loss_of(adapted.eval(), batch(1)).backward()
    assert graphs.num_replayed == 1


def test_a_cache_is_never_recorded() -> None:
    adapted, graphs = recorded()
    tokens = batch(1)["input_ids"]
    for _ in range(EAGER_PASSES + 1):
        cache = DynamicCache(config=adapted.config)
        adapted(input_ids=tokens, past_key_values=cache, use_cache=True).logits.sum().backward()
        assert cache.get_seq_length() == tokens.shape[1]
    assert graphs.eager["an argument is a DynamicCache"] == EAGER_PASSES + 1 and len(graphs.recordings) == 1


def test_switched_off_adapters_are_off() -> None:
    adapted, graphs = recorded()
    given = batch(1)
    on = loss_of(adapted, given).detach()
    with adapted.disable_adapter():
        found = loss_of(adapted, given).detach()
    plain = adapted_model()
    with plain.disable_adapter():
        expected = loss_of(plain, given).detach()
    assert torch.equal(found, expected) and not torch.equal(found, on)
    assert graphs.eager["adapters are switched off"] == 1


def test_every_shape_is_recorded_by_itself_up_to_a_number() -> None:
    adapted, graphs = recorded()
    lengths = range(13, 13 + MAX_SHAPES)
    for length in lengths:
        for number in range(EAGER_PASSES + 1):
            loss_of(adapted, batch(number, length)).backward()
    assert len(graphs.recordings) == MAX_SHAPES
    assert graphs.eager[f"more than {MAX_SHAPES} shapes"] == 1
    # The first is still there.
    loss_of(adapted, batch(7)).backward()
    assert graphs.num_replayed == MAX_SHAPES + 1


def test_parameters_that_moved_are_recorded_anew() -> None:
    adapted, graphs = recorded()
    plain = adapted_model()
    for model in (adapted, plain):
        for p in model.trained_parameters().values():
            p.data = 2 * p.data
    batches = [batch(number) for number in range(4)]
    assert_equal(take_steps(adapted, batches), take_steps(plain, batches))
    assert graphs.recorder.num == 4 and graphs.num_replayed == 1 + len(batches) - EAGER_PASSES


def test_what_cannot_be_recorded_runs_as_always_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def record(self, run: Any) -> Any:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    adapted = adapted_model()
    graphs = use_graphs(adapted, recorder=Failing())
    batches = [batch(number) for number in range(4)]
    assert_equal(take_steps(adapted, batches), take_steps(adapted_model(), batches))
    assert graphs.describe() == "no CUDA graphs: recording failed: operation not permitted"
    assert [record.getMessage() for record in caplog.records] == [
        "Training without CUDA graphs: recording failed: operation not permitted."
    ]


def test_an_output_that_is_more_than_hidden_states_is_not_recorded() -> None:
    adapted = adapted_model()
    graphs = use_graphs(adapted, recorder=TapeRecorder())
    for _ in range(EAGER_PASSES + 1):
        adapted(**batch(1), use_cache=False, output_hidden_states=True).logits.sum().backward()
    assert graphs.refusal == "recording failed: the backbone returned hidden_states beside its hidden states"


def test_refusals() -> None:
    assert use_graphs(adapted_model()).describe() == "no CUDA graphs: runs on cpu"
    experts = use_graphs(adapted_model(("granite_hybrid", "moe"), recipe="attention"), recorder=TapeRecorder())
    assert experts.refusal == "2 of 2 layers keep the model's own forward"
    dropping = tiny_model(FAMILIES[0])
    recipe = ssmtune.placement.named_recipe("all", rank=2, alpha=4.0, dropout=0.1)
    adapted = ssmtune.attach(dropping, ssmtune.make_plan(dropping, recipe), fast="require").train()
    assert use_graphs(adapted, recorder=TapeRecorder()).refusal is None
    keep_activations(adapted, "small")
    assert use_graphs(adapted, recorder=TapeRecorder()).refusal == "recomputed layers draw their dropout again"


def test_recomputed_layers_are_replayed() -> None:
    batches = [batch(number) for number in range(4)]
    adapted, plain = adapted_model(), adapted_model()
    keep_activations(adapted, "small")
    graphs = use_graphs(adapted, recorder=TapeRecorder())
    assert_equal(take_steps(adapted, batches), take_steps(plain, batches))
    assert graphs.num_replayed == len(batches) - EAGER_PASSES


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, graphs = recorded()
    monkeypatch.setenv(graphs_module.SWITCH, "off")
    loss_of(adapted, batch(1)).backward()
    assert graphs.num_replayed == 1 and graphs.eager["SSMTUNE_GRAPHS=off"] == 1


def test_detaching_takes_them_off() -> None:
    adapted, graphs = recorded()
    base = adapted.detach()
    assert not any("forward" in vars(module) for module in base.modules())
    assert graphs.num_replayed == 1
