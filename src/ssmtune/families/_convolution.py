"""Our depthwise convolution under the names that transformers' recurrent layers call it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call


def convolution_operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """The convolutions of one layer, over a whole row and step by step."""
    import torch.nn.functional as F

    from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
    from ssmtune.ops.documents import convolve_from_window

    layer: Any = module.layer_idx

    def conv(x: Any, weight: Any, bias: Any = None, activation: Any = None, **_: Any) -> Any:
        settle_window(call, layer)
        if call.recorded is not None:
            num_kept = weight.shape[-1] - 1
            call.recorded["window"] = F.pad(x, (num_kept, 0))[..., x.shape[-1] :]
        if call.seq_idx is not None or call.start is not None:
            # A new cache pads a row that is shorter than the convolution; the padding belongs to no document.
            x = x[..., -call.num_steps :]

        def convolve(x: Any, window: Any, seq_idx: Any, mask: Any) -> Any:
            return causal_conv1d(
                x, weight, bias, activation, initial_state_BCK=window, seq_idx=seq_idx, padding_mask=mask
            )

        return convolve_from_window(call, x, convolve)

    def update(x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        return causal_conv1d_update(x, conv_state, weight, bias, activation)

    return {"causal_conv1d_fn": conv, "causal_conv1d_update": update}


def settle_window(call: Call, layer: int) -> None:
    """Put right what the cache keeps for the convolution: zero at padding, and a start's window before the first token.

    The forward has stored the inputs as the input projection gave them, which with a bias is not zero at padding.
    """
    if call.cache is None:
        return
    window_BCK = call.cache.get_conv_state(layer)
    if call.padding_mask is not None:
        mask = call.padding_mask[:, -window_BCK.shape[-1] :]
        window_BCK[..., -mask.shape[-1] :].mul_(mask[:, None])
    if call.start is not None:
        _enter_start(call, call.start.window_CK, window_BCK)


def _enter_start(call: Call, start_CK: torch.Tensor, window_BCK: torch.Tensor) -> None:
    """Write a start's inputs [C, K-1] into the cached steps before the (last) document's first token, in place."""
    import torch

    batch, num_kept = window_BCK.shape[0], start_CK.shape[-1]
    num_before = torch.zeros(batch, dtype=torch.long, device=window_BCK.device)
    if call.padding_mask is not None:
        num_before = (call.padding_mask.cumsum(dim=1) == 0).sum(dim=1)
    if call.seq_idx is not None:
        num_before = (call.seq_idx != call.seq_idx[:, -1:]).sum(dim=1)
    # Steps of the row that the cache keeps, counted from the row's first; then from the start's first input.
    steps = torch.arange(window_BCK.shape[-1], device=window_BCK.device) + call.num_steps - window_BCK.shape[-1]
    taken_BK = steps - num_before[:, None] + num_kept
    inside_BK = (taken_BK >= 0) & (taken_BK < num_kept)
    filled_BCK = start_CK[:, taken_BK.clamp(0, num_kept - 1)].transpose(0, 1)
    window_BCK.copy_(torch.where(inside_BK[:, None], filled_BCK.to(window_BCK.dtype), window_BCK))
