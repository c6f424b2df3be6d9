"""The forwards of RecurrentGemma that ssmtune replaces: of its recurrent block, and of the model around it.

The layers call no named functions, keep their states on themselves, whatever cache they are given, and see no padding
mask; here the states live in the cache that is passed, and the model returns it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ssmtune.ops.seam import Call

DECAY_SCALE = -8.0
"""The paper's constant c: log a = -8 softplus(Lambda) r."""


def griffin_methods(module: Any, call: Call) -> Mapping[str, Callable[..., Any]]:
    """The forward of a recurrent block, of the RG-LRU in it, or of the model."""
    if hasattr(module, "rg_lru"):
        return {"forward": _recurrent_block(module, call)}
    return {"forward": partial(_unit, module) if hasattr(module, "recurrent_param") else _model(module)}


def _model(module: Any) -> Callable[..., Any]:
    """The model's forward, which also hands the padding mask to the recurrent blocks and the cache to the caller."""
    original = types.MethodType(type(module).forward, module)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        from transformers import DynamicCache

        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        use_cache = given.get("use_cache")
        if cache is None and (module.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=module.config)
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if mask is not None and not isinstance(mask, dict) and mask.dim() == 2:
            mask = mask[:, -tokens.shape[1] :]
            given["padding_mask"] = None if bool(mask.bool().all()) else mask
        output = original(**{**given, "past_key_values": cache})
        if cache is not None and not isinstance(output, tuple):
            output["past_key_values"] = cache
        return output

    return forward


def _recurrent_block(module: Any, call: Call) -> Callable[..., Any]:
    """The block of Griffin: a gate beside convolution and RG-LRU, whose states live in the cache that is passed."""

    def forward(
        input_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        seq_idx: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        from ssmtune.ops.causal_conv1d import causal_conv1d

        window = state = None
        if past_key_values is not None and past_key_values.has_previous_state(call.layer):
            # Copies: the cache is written in place below, and a gradient may still need what it held.
            window = past_key_values.get_conv_state(call.layer).clone()
            state = past_key_values.get_recurrent_state(call.layer).clone()
        gate = module.act_fn(module.linear_y(input_states))
        x_BCT = module.linear_x(input_states).transpose(1, 2)
        conv = module.conv_1d
        x_BTC = causal_conv1d(
            x_BCT,
            conv.weight.squeeze(1),
            conv.bias,
            initial_state_BCK=window,
            seq_idx=seq_idx,
            padding_mask=padding_mask,
        ).transpose(1, 2)
        y_BTC, final = module.rg_lru(
            x_BTC,
            initial_state_BD=state,
            # With a state, a row begins here only where all of it before was padding.
            starts_BT=None if state is None else (position_ids == 0).expand(x_BTC.shape[:2]),
            seq_idx=seq_idx,
            padding_mask=padding_mask,
        )
        if past_key_values is not None:
            window = _last_inputs(x_BCT, window, module.conv1d_width - 1, padding_mask)
            past_key_values.update_conv_state(window, call.layer)
            past_key_values.update_recurrent_state(final, call.layer)
        return module.linear_out(y_BTC * gate), None

    return forward


def _unit(unit: Any, x_BTC: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of the RG-LRU: outputs [B, T, C] and final state [B, C]; a gate mixes the channels of one head.

    `options` are those of the operation.
    """
    import torch

    from ssmtune.ops.rg_lru import rg_lru

    heads = x_BTC.view(*x_BTC.shape[:2], unit.num_attention_heads, unit.block_width)

    def gate(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, weight) + bias).flatten(-2)

    decay = DECAY_SCALE * torch.nn.functional.softplus(unit.recurrent_param)
    log_a = gate(unit.recurrent_gate_weight, unit.recurrent_gate_bias) * decay
    return rg_lru(x_BTC * gate(unit.input_gate_weight, unit.input_gate_bias), log_a, **options)


def _last_inputs(
    x_BCT: torch.Tensor, window: torch.Tensor | None, length: int, padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """The last `length` real inputs [B, C, length], those of the window before among them; zero before the first."""
    import torch

    before = x_BCT.new_zeros(*x_BCT.shape[:2], length) if window is None else window
    inputs = torch.cat([before, x_BCT], dim=-1)
    if padding_mask is None:
        return inputs[..., inputs.shape[-1] - length :]
    is_real = torch.nn.functional.pad(padding_mask.bool(), (length, 0), value=True)
    # A stable sort puts the padding first and leaves the real steps in their order.
    steps = is_real.int().sort(dim=1, stable=True).indices[:, -length:]
    return inputs.gather(-1, steps[:, None].expand(-1, x_BCT.shape[1], -1))
