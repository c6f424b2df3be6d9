"""Depthwise causal convolution in plain PyTorch.

Dimensions: B batch, C channels, T time, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.errors import ConfigError
from ssmtune.ops.precision import outside_autocast


@outside_autocast
def causal_conv1d(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state_BCK: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return act(conv(x) + bias), [B, C, T], in the dtype of `x_BCT`; differentiable in x, weight, bias and initial state.

    Tap K-1 reads the current step, tap 0 the step K-1 earlier; steps before the first count as zero.
    `initial_state_BCK` [B, C, K-1]: the inputs before the first step instead, of the first document; with padding on
    the left they are those before the first real step.
    `seq_idx` [B, T]: a tap that would reach into another document reads zero.
    `padding_mask` [B, T'] with T' <= T: steps where it is 0 read as zero; it aligns with the end of the sequence,
    since the steps in front of it come from a cache.
    Raises `ConfigError` for an activation other than None, "silu" or "swish", and for a state that is not K-1 long.
    """
    num_new = num_steps = x_BCT.shape[-1]
    num_taps = weight_CK.shape[-1]
    # Taps are added in fp32: bf16 would round between them.
    dtype = torch.promote_types(x_BCT.dtype, torch.float32)
    x = x_BCT.to(dtype)
    mask = None
    if padding_mask is not None:
        mask = F.pad(padding_mask.to(dtype), (num_steps - padding_mask.shape[-1], 0), value=1.0)
        x = x * mask[:, None, :]
    if initial_state_BCK is not None:
        x = _prepend(initial_state_BCK.to(dtype), x, num_taps, mask)
        num_steps = x.shape[-1]
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, num_taps - 1), seq_idx], dim=1)
    weight = weight_CK.to(dtype)
    bias = None if bias_C is None else bias_C.to(dtype)
    if seq_idx is None:
        out = F.conv1d(x, weight[:, None, :], bias, padding=num_taps - 1, groups=weight.shape[0])[..., :num_steps]
    else:
        out = x * weight[:, -1, None]
        for lag in range(1, min(num_taps, num_steps)):
            same_document = seq_idx[:, None, lag:] == seq_idx[:, None, :-lag]
            shifted = x[..., :-lag] * same_document
            out = out + F.pad(shifted, (lag, 0)) * weight[:, num_taps - 1 - lag, None]
        if bias is not None:
            out = out + bias[:, None]
    return _activate(out[..., num_steps - num_new :], activation).to(x_BCT.dtype)


def _prepend(state_BCK: torch.Tensor, x_BCT: torch.Tensor, num_taps: int, mask_BT: torch.Tensor | None) -> torch.Tensor:
    """[B, C, K-1+T]: `x_BCT`, zero at padding, with the state in the K-1 steps before its first real one."""
    check_window(state_BCK, num_taps)
    if mask_BT is None:
        return torch.cat([state_BCK, x_BCT], dim=-1)
    num_padded = (mask_BT.cumsum(dim=1) == 0).sum(dim=1)
    steps = num_padded[:, None] + torch.arange(num_taps - 1, device=x_BCT.device)
    return F.pad(x_BCT, (num_taps - 1, 0)).scatter_add(-1, steps[:, None].expand(state_BCK.shape), state_BCK)


def check_window(state_BCK: torch.Tensor, num_taps: int) -> None:
    """Raise `ConfigError` for an initial state of another length than the convolution reaches back."""
    if state_BCK.shape[-1] != num_taps - 1:
        raise ConfigError(
            f"causal_conv1d: the initial state holds {state_BCK.shape[-1]} inputs; "
            f"a convolution of {num_taps} taps needs {num_taps - 1}. Pass the last {num_taps - 1} inputs."
        )


@outside_autocast
def causal_conv1d_update(
    x_BCT: torch.Tensor,
    conv_state_BCK: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """Return the convolution of the new steps `x_BCT`, [B, C, T], and shift them into `conv_state_BCK` in place.

    The state holds the last inputs before the activation; its length may be K or K-1.
    """
    dtype = torch.promote_types(x_BCT.dtype, torch.float32)
    window = torch.cat([conv_state_BCK.to(dtype), x_BCT.to(dtype)], dim=-1)
    conv_state_BCK.copy_(window[..., -conv_state_BCK.shape[-1] :])
    bias = None if bias_C is None else bias_C.to(dtype)
    out = F.conv1d(window, weight_CK.to(dtype)[:, None, :], bias, groups=weight_CK.shape[0])[..., -x_BCT.shape[-1] :]
    return _activate(out, activation).to(x_BCT.dtype)


def _activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation is None:
        return x
    if activation in ("silu", "swish"):
        return F.silu(x)
    raise ConfigError(f"causal_conv1d: got activation {activation!r}; allowed: None, 'silu', 'swish'.")
