"""Depthwise causal convolution over time, whole sequences and single steps."""

from __future__ import annotations

import torch

from ssmtune.ops.backend import Backend, choose, gradient_refusal
from ssmtune.ops.causal_conv1d import reference

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x_BCT: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    initial_state_BCK: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return act(conv(x) + bias), [B, C, T], in the dtype of `x_BCT`; differentiable in x, weight, bias and initial state.

    Tap K-1 reads the current step, tap 0 the step K-1 earlier; steps before the first count as zero.
    `initial_state_BCK` [B, C, K-1]: the inputs before the first step instead, of the first document; with padding on
    the left they are those before the first real step.
    `seq_idx` [B, T]: a tap that would reach into another document reads zero.
    `padding_mask` [B, T'] with T' <= T: steps where it is 0 read as zero; it aligns with the end of the sequence,
    since the steps in front of it come from a cache.
    `backend`: `ops.backend` chooses. Raises `ConfigError` for an activation other than None, "silu" or "swish", for a
    state that is not K-1 long, and when "triton" is asked for and cannot run.
    """
    run = reference.causal_conv1d
    if choose("causal_conv1d", x_BCT, backend, _refusal(x_BCT, weight_CK, activation)).name == "triton":
        from ssmtune.ops.causal_conv1d import triton

        run = triton.causal_conv1d
    return run(
        x_BCT,
        weight_CK,
        bias_C,
        activation,
        initial_state_BCK=initial_state_BCK,
        seq_idx=seq_idx,
        padding_mask=padding_mask,
    )


def causal_conv1d_update(
    x_BCT: torch.Tensor,
    conv_state_BCK: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the convolution of the new steps `x_BCT`, [B, C, T], and shift them into `conv_state_BCK` in place.

    The state holds the last inputs before the activation; its length may be K or K-1.
    `backend`: `ops.backend` chooses; the kernel takes one step and gives no gradients. Raises `ConfigError` as
    `causal_conv1d` does.
    """
    run = reference.causal_conv1d_update
    refusal = _refusal(x_BCT, weight_CK, activation) or gradient_refusal(x_BCT, conv_state_BCK, weight_CK, bias_C)
    if refusal is None and x_BCT.shape[-1] != 1:
        refusal = f"{x_BCT.shape[-1]} steps at once; the kernel takes one"
    if choose("causal_conv1d_update", x_BCT, backend, refusal).name == "triton":
        from ssmtune.ops.causal_conv1d import triton

        run = triton.causal_conv1d_update
    return run(x_BCT, conv_state_BCK, weight_CK, bias_C, activation)


def _refusal(x_BCT: torch.Tensor, weight_CK: torch.Tensor, activation: str | None) -> str | None:
    """Why the kernels cannot serve these inputs, or None."""
    if x_BCT.dtype not in (torch.float32, torch.bfloat16):
        return f"inputs are {str(x_BCT.dtype).removeprefix('torch.')}; the kernels take fp32 and bf16"
    if activation not in (None, "silu", "swish"):
        return f"activation {activation!r}"
    if weight_CK.shape[-1] > 8:
        return f"{weight_CK.shape[-1]} taps are over 8"
    return None
