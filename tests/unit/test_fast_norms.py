"""Which norms of transformers run on ssmtune's operation outside rewritten layers, and that they stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import BF16_ROUND_ONCE, relative_rms
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated

from ssmtune.fast._norm import norm_forward, norm_shift

WIDTH = 24
NORMS = [(GraniteRMSNorm, 0.0), (Qwen3_5RMSNorm, 1.0), (Gemma3RMSNorm, 1.0)]


def drawn(norm_class: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    norm = norm_class(WIDTH).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(0.3 * torch.randn(WIDTH))
    return norm


def results(run: Any, norm: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of the input and the weight."""
    x = x.clone().requires_grad_()
    y = run(x)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight), upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm_class", "shift"), NORMS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_norm_keeps_its_values(norm_class: Any, shift: float, dtype: torch.dtype) -> None:
    norm = drawn(norm_class, dtype)
    found = norm_shift(norm)
    assert found == shift
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = drawn(norm_class, torch.float64)
    exact.load_state_dict(norm.state_dict())
    # The class of some norms computes in fp32 whatever it is given: fp32 truth is exact enough for bf16 and for itself.
    truth = results(exact.forward, exact, x.double())
    limit = BF16_ROUND_ONCE if dtype == torch.bfloat16 else 1e-6
    for value, expected in zip(results(norm_forward(norm, found), norm, x), truth, strict=True):
        assert value.dtype == dtype and relative_rms(value, expected.double()) <= limit


def test_the_wrong_shift_would_be_seen() -> None:
    norm = drawn(Qwen3_5RMSNorm, torch.float32)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_rms(norm_forward(norm, 0.0)(x), norm(x)) > 0.1


class HalfShiftedRMSNorm(GraniteRMSNorm):
    """(0.5 + weight) * norm(x), which nobody publishes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As its base, for another weight."""
        return super().forward(hidden_states) * ((self.weight + 0.5) / self.weight)


@pytest.mark.parametrize("module", [HalfShiftedRMSNorm(WIDTH), Qwen3_5RMSNormGated(WIDTH), nn.LayerNorm(WIDTH)])
def test_others_keep_their_own_forward(module: nn.Module) -> None:
    assert norm_shift(module) is None


def test_a_weight_near_nothing_is_not_lost_beside_one_in_bf16() -> None:
    norm = drawn(Qwen3_5RMSNorm, torch.bfloat16)
    with torch.no_grad():
        norm.weight.fill_(2.0**-10)
    x = torch.full((1, WIDTH), 3.0)
    y = norm_forward(norm, 1.0)(x).detach()
    # bf16 knows no number between 1 and 1 + 2^-7.
    assert y.max().item() == pytest.approx(1 + 2.0**-10, abs=1e-6)


def test_fp64_stays_fp64() -> None:
    norm = drawn(Qwen3_5RMSNorm, torch.float64)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    with torch.no_grad():
        assert relative_rms(norm_forward(norm, 1.0)(x), normed * (1 + norm.weight)) <= 1e-14
