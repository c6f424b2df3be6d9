"""Our depthwise convolution under the names that transformers' recurrent layers call it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ssmtune.ops.seam import Call


def convolution_operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """The convolutions of one layer, over a whole row and step by step."""
    from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update

    layer: Any = module.layer_idx

    def conv(x: Any, weight: Any, bias: Any = None, activation: Any = None, **_: Any) -> Any:
        clear_padding(call, layer)
        if call.seq_idx is not None:
            # A new cache pads a row that is shorter than the convolution; the padding belongs to no document.
            x = x[..., -call.seq_idx.shape[-1] :]
        return causal_conv1d(x, weight, bias, activation, seq_idx=call.seq_idx, padding_mask=call.padding_mask)

    def update(x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        return causal_conv1d_update(x, conv_state, weight, bias, activation)

    return {"causal_conv1d_fn": conv, "causal_conv1d_update": update}


def clear_padding(call: Call, layer: int) -> None:
    """Zero the padding among the inputs that the cache keeps for the convolution.

    The forward has stored them as the input projection gave them, which with a bias is not zero.
    """
    if call.cache is None or call.padding_mask is None:
        return
    window = call.cache.get_conv_state(layer)
    mask = call.padding_mask[:, -window.shape[-1] :]
    window[..., -mask.shape[-1] :].mul_(mask[:, None])
