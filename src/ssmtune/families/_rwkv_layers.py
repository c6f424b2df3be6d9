"""The parts of RWKV-4's layers that ssmtune replaces: what they read of the tokens before, and where that is kept.

The model hands its layers nothing but `state`, so documents and padding travel with it (`State`).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ssmtune.ops.seam import Call

MLP_SHIFT, MIXER_SHIFT, SUMS = 0, 1, slice(2, 5)
"""Places in the state: the last input of the MLP and of the mixer, and the three sums of the WKV; each [B, D, layers]."""


class State(list[Any]):
    """The model's `state` (empty where there is no cache), with the documents and padding of this call, [B, T] each."""

    def __init__(self, tensors: Iterable[Any] = (), seq_idx: Any = None, padding_mask: Any = None) -> None:
        super().__init__(tensors)
        self.seq_idx = seq_idx
        self.padding_mask = padding_mask


def rwkv_operations(module: Any, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our WKV under the name that the mixer calls it by; nothing for the other modules."""
    if not hasattr(module, "extract_key_value"):
        return {}

    def wkv(
        time_decay: Any, time_first: Any, key: Any, value: Any, state: Any = None, return_state: bool = False
    ) -> Any:
        import torch

        from ssmtune.ops.rwkv_wkv import rwkv_wkv

        y, final = rwkv_wkv(
            time_decay,
            time_first,
            key,
            value,
            initial_state_3BD=torch.stack(tuple(state)) if state else None,
            seq_idx=call.seq_idx,
            padding_mask=call.padding_mask,
        )
        return y, final.unbind() if state else None

    return {"rwkv_linear_attention": wkv}


def rwkv_methods(module: Any, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our token shift in the mixer and the MLP, and a forward of the model that hands them documents and padding."""
    if hasattr(module, "extract_key_value"):
        return {"extract_key_value": partial(_extract_key_value, module, call)}
    if hasattr(module, "time_shift"):
        return {"forward": partial(_mlp, module)}
    return {"forward": _model(module)}


def _model(module: Any) -> Callable[..., Any]:
    """The model's forward, with the documents and padding in `state`, and without its rescaling of weights in place."""
    original = types.MethodType(type(module).forward, module)
    signature = inspect.signature(original)
    _restore_weights(module.rwkv)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        state, mask, use_cache = given.get("state"), given.pop("attention_mask", None), given.get("use_cache")
        seq_idx = state.seq_idx if isinstance(state, State) else None
        if mask is not None:
            tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
            mask = mask[:, -tokens.shape[1] :]
            mask = None if bool(mask.bool().all()) else mask
        if not state and seq_idx is None:
            default = module.config.use_cache and not module.training
            state = _empty_state(module, given) if (default if use_cache is None else use_cache) else ()
        if state or seq_idx is not None or mask is not None:
            given["state"] = State(state or (), seq_idx, mask)
        try:
            # The layers rescale by themselves; with this the model agrees, and leaves the weights alone.
            module.rwkv.layers_are_rescaled = not module.training
            return original(**given)
        finally:
            module.rwkv.layers_are_rescaled = False

    return forward


def _restore_weights(rwkv: Any) -> None:
    """Undo the rescaling of an evaluation before: powers of two, so the weights are again those of the checkpoint."""
    import torch

    if not rwkv.layers_are_rescaled:
        return
    with torch.no_grad():
        for block in rwkv.blocks if rwkv.config.rescale_every > 0 else ():
            for weight in (block.attention.output.weight, block.feed_forward.value.weight):
                weight.mul_(2 ** (block.layer_id // rwkv.config.rescale_every))
    rwkv.layers_are_rescaled = False


def _empty_state(module: Any, given: Mapping[str, Any]) -> list[torch.Tensor]:
    """The state before the first token; the WKV's sums are as wide as the keys, which the model's own forgets."""
    import torch

    config, embeds = module.config, given.get("inputs_embeds")
    tokens = given["input_ids"] if embeds is None else embeds
    dtype = module.rwkv.embeddings.weight.dtype if embeds is None else embeds.dtype
    shapes = [config.hidden_size] * 2 + [config.attention_hidden_size] * 3
    state = [
        torch.zeros(
            (tokens.shape[0], width, config.num_hidden_layers),
            dtype=dtype if index < 2 else torch.float32,
            device=tokens.device,
        )
        for index, width in enumerate(shapes)
    ]
    state[-1] -= 1e38
    return state


def _extract_key_value(module: Any, call: Call, hidden: torch.Tensor, state: Any = None) -> tuple[Any, Any, Any, Any]:
    """The method of `RwkvSelfAttention`: receptance, key, value [B, T, D] and the state with its last input replaced."""
    import torch

    call.seq_idx, call.padding_mask = getattr(state, "seq_idx", None), getattr(state, "padding_mask", None)
    shifted = _shift(hidden, state, MIXER_SHIFT, module.layer_id)
    key = module.key(_mix(hidden, shifted, module.time_mix_key))
    value = module.value(_mix(hidden, shifted, module.time_mix_value))
    receptance = torch.sigmoid(module.receptance(_mix(hidden, shifted, module.time_mix_receptance)))
    return receptance * _rescale(module), key, value, state


def _mlp(module: Any, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """The forward of `RwkvFeedForward`."""
    import torch

    shifted = _shift(hidden, state, MLP_SHIFT, module.layer_id)
    key = torch.square(torch.relu(module.key(_mix(hidden, shifted, module.time_mix_key))))
    receptance = torch.sigmoid(module.receptance(_mix(hidden, shifted, module.time_mix_receptance)))
    return receptance * _rescale(module) * module.value(key), state


def _mix(hidden: torch.Tensor, shifted: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return hidden * share + shifted * (1 - share)


def _rescale(module: Any) -> float:
    """The power of two by which a layer's output is divided in evaluation, against overflow in fp16.

    The model divides the output weights in place instead, which an adapter on them does not follow.
    """
    every = module.config.rescale_every
    return 1.0 if module.training or every <= 0 else 2.0 ** -(module.layer_id // every)


def _shift(hidden_BTD: torch.Tensor, state: Any, place: int, layer: int) -> torch.Tensor:
    """The input of the real step before each, [B, T, D]: of the state at the first, zero where a document begins.

    Puts the last real input into the state.
    """
    import torch

    # A copy: the state is written in place below, and a gradient may still need what it held.
    first_BD = state[place][:, :, layer].clone() if state else torch.zeros_like(hidden_BTD[:, 0])
    inputs = torch.cat([first_BD[:, None].to(hidden_BTD.dtype), hidden_BTD], dim=1)
    mask, seq_idx = getattr(state, "padding_mask", None), getattr(state, "seq_idx", None)
    if mask is None:
        shifted, last_BD = inputs[:, :-1], inputs[:, -1]
    else:
        # The latest real step up to each, counted from 1; 0 is what came before.
        latest = (mask.bool() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).cummax(dim=1).values
        steps = torch.nn.functional.pad(latest, (1, 0))[..., None].expand(inputs.shape)
        gathered = inputs.gather(1, steps)
        shifted, last_BD = gathered[:, :-1], gathered[:, -1]
    if seq_idx is not None:
        begins = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        shifted = shifted.masked_fill(begins[..., None], 0.0)
    if state:
        state[place][:, :, layer] = last_BD
    return shifted
