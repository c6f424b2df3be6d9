"""The parts of xLSTM that ssmtune replaces: the matrix memory, and how a state reaches the layers and comes back.

The model hands its layers the entries of a cache and nothing else, so documents and padding travel with these.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.errors import AttachError, UnsupportedModel

if TYPE_CHECKING:
    import torch

    from ssmtune.ops.seam import Call


class States:
    """In place of transformers' `xLSTMCache`: the states of all layers, with the documents and padding of this call.

    A layer gets entries that keep their values: gradients and recomputed layers still see what it was given when the
    model has written the next state, which replaces the one before.
    """

    def __init__(self, num_layers: int) -> None:
        self.values: list[Any] = [(None, None, None)] * num_layers
        self.seq_idx: Any = None
        self.padding_mask: Any = None
        self.seqlen_offset = 0

    @property
    def rnn_state(self) -> States:
        """Itself: the model reads and writes `rnn_state[layer]`."""
        return self

    def get_seq_length(self) -> int:
        """Number of tokens seen: the model counts them."""
        return self.seqlen_offset

    def __getitem__(self, layer: int) -> tuple[_Entry, ...]:
        return tuple(_Entry(self, layer, index) for index in range(3))


class _Entry:
    """One of a layer's three states as it was when the entry was made; `copy_` writes the cache, not the entry."""

    def __init__(self, states: States, layer: int, index: int) -> None:
        self.value = states.values[layer][index]
        self.seq_idx, self.padding_mask = states.seq_idx, states.padding_mask
        self._target = states, layer, index

    def copy_(self, value: torch.Tensor) -> None:
        """Put `value` into the cache."""
        states, layer, index = self._target
        states.values[layer] = (*states.values[layer][:index], value, *states.values[layer][index + 1 :])


def xlstm_methods(module: Any, call: Call) -> Mapping[str, Callable[..., Any]]:
    """The forward of the matrix memory, or that of the model."""
    return {"forward": _model(module) if hasattr(module, "backbone") else partial(_memory, module, call)}


def xlstm_states(module: Any) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what can be added to a matrix memory, [H, K, V], and to its output, [H, V]; nothing to the model."""
    if hasattr(module, "backbone"):
        return {}
    config = module.config
    # As the layers compute them: the config's own widths are rounded up to multiples of 64.
    keys, values = (int(config.hidden_size * factor) for factor in (config.qk_dim_factor, config.v_dim_factor))
    memory = (config.num_heads, keys // config.num_heads, values // config.num_heads)
    return {"initial_state": memory, "state_offset": memory, "output_offset": (memory[0], memory[2])}


def _memory(
    backend: Any,
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    igate: torch.Tensor,
    fgate: torch.Tensor,
    c_initial: _Entry | None = None,
    n_initial: _Entry | None = None,
    m_initial: _Entry | None = None,
) -> tuple[torch.Tensor, Any]:
    """The forward of `xLSTMBackend`, whatever mode and kernels the config names: outputs and the final state.

    A trained initial state is the memory C, with a normaliser of zero; an offset is added to C where it is read.
    """
    from ssmtune.ops.documents import scan_from_state
    from ssmtune.ops.mlstm import mlstm

    entries = [entry for entry in (c_initial, n_initial, m_initial) if entry is not None]
    values = tuple(entry.value for entry in entries if entry.value is not None)
    call.seq_idx, call.padding_mask = (entries[0].seq_idx, entries[0].padding_mask) if entries else (None, None)

    def run(q: Any, k: Any, v: Any, i: Any, f: Any, state: Any, seq_idx: Any, mask: Any) -> Any:
        if state is not None and not isinstance(state, tuple):
            normaliser = state.new_zeros(state.shape[:-1])
            state = state, normaliser, normaliser[..., :1]
        y, final = mlstm(
            *(x.transpose(1, 2) for x in (q, k, v, i, f)),
            initial_state=state,
            seq_idx=seq_idx,
            padding_mask=mask,
            offset_HKV=call.state("state_offset"),
            eps=backend.config.eps,
        )
        return y.transpose(1, 2), final

    inputs = tuple(x.transpose(1, 2) for x in (query, key, value, igate, fgate))
    y_BTHV, final = scan_from_state(call, values or None, run, inputs)
    constant_HV = call.state("output_offset")
    if constant_HV is not None:
        y_BTHV = (y_BTHV.float() + constant_HV).to(y_BTHV.dtype)
    return y_BTHV.transpose(1, 2), final


def _model(module: Any) -> Callable[..., Any]:
    """The model's forward, with a cache of ours that carries documents and padding."""
    backend = type(module.backbone.blocks[0]).__module__
    if not backend.startswith("transformers."):
        raise UnsupportedModel(
            f"xlstm: the layers come from the package {backend.partition('.')[0]!r}, which transformers uses when it is "
            "installed; only transformers' own are supported. Uninstall the package and load the model again."
        )
    original = types.MethodType(type(module).forward, module)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        given.pop("position_ids", None)
        tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        mask, seq_idx = given.pop("attention_mask", None), given.pop("seq_idx", None)
        if mask is not None:
            mask = mask[:, -tokens.shape[1] :]
            mask = None if bool(mask.bool().all()) else mask
        limit = module.config.max_inference_chunksize
        in_pieces = not module.training and tokens.shape[1] > limit
        if in_pieces and (mask is not None or seq_idx is not None):
            raise AttachError(
                f"xlstm: {tokens.shape[1]} steps with padding or several documents in a row; transformers runs more than "
                f"config.max_inference_chunksize={limit} in pieces, and hands neither on to them. Raise that number."
            )
        states, use_cache = given.get("cache_params"), given.get("use_cache")
        if use_cache is None:
            use_cache = module.config.use_cache and not module.training
        if states is None and (use_cache or in_pieces or mask is not None or seq_idx is not None):
            states = States(len(module.backbone.blocks))
        if not isinstance(states, States | None):
            raise AttachError(
                f"xlstm: got a cache_params of class {type(states).__name__}, whose states are written in place. "
                "Pass none for a new sequence, and then the one that the model returned."
            )
        if states is not None:
            states.seq_idx, states.padding_mask = seq_idx, mask
        return original(**{**given, "cache_params": states, "use_cache": use_cache})

    return forward
