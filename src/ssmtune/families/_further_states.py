"""Further states of a Mamba-2 recurrence: their own channels through a convolution of their own, beside the layer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.families._convolution import convolution_operations

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call

FURTHER = 1
"""Index of a cache layer's second convolution state."""

Widened = Callable[[Any, Any], tuple[Any, Any]]


def further_states(module: nn.Module, call: Call) -> tuple[Mapping[str, Callable[..., Any]], Widened]:
    """Return the layer's convolutions, which convolve the additional scan's channels as well, and what adds those to B and C.

    The second takes the layer's B and C [B, (T,) G, N] and returns them with the additional states behind their own; as
    they are where there is no additional scan.
    """
    import torch

    convolutions = convolution_operations(module, call)
    further: dict[str, Any] = {}
    layer: Any = module.layer_idx

    def convolve(x: Any, weight: Any, bias: Any = None, activation: Any = None, **options: Any) -> Any:
        _convolve_further(call, layer, further, activation)
        return convolutions["causal_conv1d_fn"](x, weight, bias, activation, **options)

    def convolve_step(x: Any, conv_state: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        _convolve_further(call, layer, further, activation)
        return convolutions["causal_conv1d_update"](x, conv_state, weight, bias, activation)

    def widened(B_GN: Any, C_GN: Any) -> tuple[Any, Any]:
        if not further:
            return B_GN, C_GN
        more_B, more_C = (further.pop(name).view(*B_GN.shape[:-1], -1) for name in ("B", "C"))
        return torch.cat([B_GN, more_B], dim=-1), torch.cat([C_GN, more_C], dim=-1)

    return {"causal_conv1d_fn": convolve, "causal_conv1d_update": convolve_step}, widened


def _convolve_further(call: Call, layer: int, further: dict[str, Any], activation: str | None) -> None:
    """Put B and C [B, T, G, n] of the additional states into `further`; nothing where there are none.

    The cache keeps the last inputs of their convolution as the layer's second window.
    """
    from ssmtune.ops.causal_conv1d import causal_conv1d

    extra = call.edit("additional_scan")
    if extra is None:
        return
    x_BRT = extra.inputs(call.hidden_BTD)
    call.hidden_BTD = None
    if call.padding_mask is not None:
        x_BRT = x_BRT * call.padding_mask[:, None, -x_BRT.shape[-1] :].to(x_BRT.dtype)
    window_BRK = None if call.cache is None else _kept_window(call.cache.layers[layer])
    convolved = causal_conv1d(
        x_BRT, extra.scan_conv, extra.scan_bias, activation, initial_state_BCK=window_BRK, seq_idx=call.seq_idx
    )
    if call.cache is not None:
        _keep_window(call.cache.layers[layer], window_BRK, x_BRT, extra.scan_conv.shape[-1] - 1)
    further["B"], further["C"] = extra.split(convolved)


def _kept_window(states: Any) -> torch.Tensor | None:
    """What `_keep_window` kept [B, R, K-1], None at the start of a sequence."""
    window: torch.Tensor | None = states.conv_states[FURTHER] if states.has_previous_state.get(FURTHER) else None
    return window


def _keep_window(states: Any, window_BRK: torch.Tensor | None, x_BRT: torch.Tensor, num_kept: int) -> None:
    """Keep the last inputs of a convolution that transformers does not know as a second state of the cache's layer.

    There the cache resets, reorders and moves them along with its own.
    """
    import torch
    import torch.nn.functional as F

    inputs = F.pad(x_BRT, (num_kept, 0)) if window_BRK is None else torch.cat([window_BRK, x_BRT], dim=-1)
    states.number_of_states = FURTHER + 1
    states.conv_states[FURTHER] = inputs[..., inputs.shape[-1] - num_kept :]
    states.conv_kernel_size[FURTHER] = num_kept
    # Membranes (`ops.membrane`) may lie there already.
    states.recurrent_states.setdefault(FURTHER, None)
    states.is_recurrent_states_initialized.setdefault(FURTHER, False)
    states.is_conv_states_initialized[FURTHER] = states.has_previous_state[FURTHER] = True
