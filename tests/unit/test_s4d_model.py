"""S4D: the convolution and the recurrence are one function, and the model is one that transformers can save and train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import LOGITS_FP32, OP_FP64, largest_difference, relative_rms
from transformers import AutoModelForCausalLM

from ssmtune.families.base import get_family
from ssmtune.operations import install_operations
from ssmtune.s4d_model import S4DConfig, S4DForCausalLM, register_s4d, s4d_convolution, s4d_recurrence


def _inputs(batch: int, num_steps: int, width: int, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "u": draw(batch, num_steps, width),
        "log_decay": torch.complex(-0.2 * draw(width, size).exp(), draw(width, size)),
        "readout": torch.complex(draw(width, size), draw(width, size)),
        "state": torch.complex(draw(batch, width, size), draw(batch, width, size)),
    }


@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_equals_recurrence_with_every_gradient(num_steps: int, with_state: bool) -> None:
    given = _inputs(2, num_steps, 3, 4)
    results: list[list[torch.Tensor]] = []
    for function in (s4d_convolution, s4d_recurrence):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        y, final = function(
            leaves["u"], leaves["log_decay"], leaves["readout"], leaves["state"] if with_state else None
        )
        (y.pow(2).sum() + (final * final.conj()).real.sum()).backward()
        grads = [leaves[name].grad for name in leaves if with_state or name != "state"]
        results.append(
            [torch.view_as_real(x.detach().to(torch.complex128)) for x in (y, final, *grads) if x is not None]
        )
    assert [len(result) for result in results] == [6 if with_state else 5] * 2
    for found, truth in zip(*results, strict=True):
        assert relative_rms(found, truth) <= OP_FP64


def test_impulse_response_is_the_kernel_of_the_paper() -> None:
    """K_l = 2 Re sum_n C (exp(dt A) - 1) / A exp(dt A l), written out for one channel."""
    given = _inputs(1, 9, 1, 4)
    impulse = torch.zeros(1, 9, 1, dtype=torch.float64)
    impulse[0, 0] = 1
    y, _ = s4d_convolution(impulse, given["log_decay"], given["readout"])
    expected = [2 * (given["readout"] * torch.exp(given["log_decay"] * lag)).sum().real for lag in range(9)]
    assert relative_rms(y[0, :, 0], torch.stack(expected)) <= OP_FP64


def _model(**options: Any) -> S4DForCausalLM:
    register_s4d()
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4} | options
    return S4DForCausalLM(S4DConfig(**sizes)).eval()


def test_saved_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(5)[None]
    assert type(loaded) is S4DForCausalLM
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_initial_values_are_those_of_s4d_lin() -> None:
    values = _model(hidden_size=64).model.layers[0].mixer.state_dict()
    assert torch.allclose(values["log_A_real"].exp(), torch.tensor(0.5))
    assert torch.equal(values["A_imag"][5], torch.pi * torch.arange(4))
    dt = values["log_dt"].exp()
    assert 1e-3 <= float(dt.min()) < 1e-2 < float(dt.max()) <= 1e-1


def test_continuous_inputs_in_place_of_tokens() -> None:
    model = _model()
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    embedded = model.model.embed_tokens(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=tokens, inputs_embeds=embedded)


def test_checkpointed_layers_give_the_gradients_of_plain_ones() -> None:
    """Two packed forwards before the backward: a recomputed layer must see the documents of its own forward."""
    plain = _model().train()
    installed = install_operations(plain, get_family("s4d"))
    checkpointed = copy.deepcopy(plain)
    installed.remove()
    grads = []
    for model in (plain, checkpointed):
        install_operations(model, get_family("s4d"))
        if model is checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = torch.zeros(())
        for lengths in ((3, 4), (5, 2)):
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            tokens = torch.arange(7)[None]
            loss = loss + model(tokens, position_ids=positions, labels=tokens).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for found, expected in zip(*grads, strict=True):
        assert largest_difference(found, expected) <= LOGITS_FP32
