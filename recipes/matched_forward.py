"""Fast whole-row forwards of the matched sisters: transformers' modules and parameters, own scan, delta rule and attention.

A sister has no multipliers (or all at 1), rotary positions in every attention, and as many key heads as value heads in
its delta rule; `MatchedForward` refuses a model of another kind.

Dims: B batch, T time, E width, H heads, K key and query width, V value width, c chunks, l and s positions in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pretrain import convolve, mix_by_scan
from torch import Tensor, nn
from transformers import PreTrainedModel

from ssmtune.errors import ConfigError

NORM_EPS = 1e-6
BLOCK = 16
"""Size of the blocks that `unit_lower_inverse` inverts by a product; the terms of a larger one would outgrow fp32."""

NEUTRAL = {
    # Attribute of the config -> the value at which the layers below are those of transformers.
    "granitemoehybrid": {
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "attention_bias": False,
    },
    "falcon_h1": {
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
        "key_multiplier": 1.0,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 1.0,
        "ssm_in_multiplier": 1.0,
        "ssm_out_multiplier": 1.0,
        "ssm_multipliers": [1.0] * 5,
        "mlp_multipliers": [1.0, 1.0],
        "mamba_rms_norm": True,
    },
    "qwen3_5_text": {},
    "parallel_gated_delta": {},
    "llama": {},
}


def unit_lower_inverse(strict_ll: Tensor) -> Tensor:
    """Return (I + A)^-1 of strictly lower triangular `A` [..., l, l]; l is a power of two, or at most `BLOCK`.

    Small blocks on the diagonal by the product (I - A)(I + A^2)(I + A^4)..., which ends since A is nilpotent; pairs of
    them by [[P, 0], [C, Q]]^-1 = [[P^-1, 0], [-Q^-1 C P^-1, Q^-1]]. Batched products only, so that a compiler fuses the rest.
    """
    size = strict_ll.shape[-1]
    block = min(size, BLOCK)
    power = _diagonal_blocks(strict_ll, block)
    eye = torch.eye(block, dtype=strict_ll.dtype, device=strict_ll.device)
    inverse = eye - power
    covered = 2
    while covered < block:
        power = power @ power
        inverse = inverse @ (eye + power)
        covered *= 2
    while block < size:
        between = _diagonal_blocks(strict_ll, 2 * block)[..., block:, :block]
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        lower = torch.cat([-(second @ between @ first), second], dim=-1)
        inverse = torch.cat([F.pad(first, (0, block)), lower], dim=-2)
        block *= 2
    return inverse.squeeze(-3)


def _diagonal_blocks(x_ll: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal, [..., blocks, size, size]."""
    number = x_ll.shape[-1] // size
    blocks = x_ll.unflatten(-1, (number, size)).unflatten(-3, (number, size))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def delta_rule(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, *, chunk: int
) -> Tensor:
    """Return `o` [B, T, H, V], at least fp32, of the gated delta rule from a zero state; q and k are normalised here.

    S = exp(g) S, S = S + k (beta (v - S^T k))^T, o = S^T q / sqrt(K). `g_BTH` is the log decay.
    Decays, inverses and states are at least fp32; other matrix products run in the dtype of `q_BTHK`.
    """
    narrow, wide = q_BTHK.dtype, torch.promote_types(q_BTHK.dtype, torch.float32)
    length, key_width = q_BTHK.shape[1], q_BTHK.shape[-1]
    padding = -length % chunk

    def in_chunks(x: Tensor) -> Tensor:
        """[B, H, c, l, ...]; added steps are zero, so they neither decay nor write."""
        padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        return padded.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1, chunk, *x.shape[3:])

    with torch.autocast(device_type=q_BTHK.device.type, enabled=False):
        q, k = (_normalise(x.to(wide)) for x in (q_BTHK, k_BTHK))
        q, k, v = (in_chunks(x.to(narrow)) for x in (q * key_width**-0.5, k, v_BTHV))
        beta = in_chunks(beta_BTH.to(wide))[..., None]
        log_decay = in_chunks(g_BTH.to(wide)).cumsum(-1)
        causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        decay = torch.where(causal, log_decay[..., :, None] - log_decay[..., None, :], -torch.inf).exp()
        from_start = log_decay.exp()[..., None]
        to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]

        couplings = ((k @ k.mT).to(wide) * decay * beta).tril(-1)
        inverse = unit_lower_inverse(couplings).to(narrow)
        u = inverse @ (v.to(wide) * beta).to(narrow)
        w = inverse @ (k.to(wide) * beta * from_start).to(narrow)
        k_end = (k.to(wide) * to_end).to(narrow).mT
        chunk_decay = from_start[..., -1:, :]

        state = torch.zeros(*k.shape[:2], key_width, v.shape[-1], dtype=wide, device=q.device)
        entering, written = [], []
        for c in range(k.shape[2]):
            entering.append(state.to(narrow))
            written.append(u[:, :, c] - w[:, :, c] @ entering[-1])
            state = chunk_decay[:, :, c] * state + (k_end[:, :, c] @ written[-1]).to(wide)
        reads = ((q @ k.mT).to(wide) * decay).to(narrow)
        o = (reads @ torch.stack(written, dim=2)).to(wide)
        o = o + ((q.to(wide) * from_start).to(narrow) @ torch.stack(entering, dim=2)).to(wide)
        return o.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


def mix_by_delta_rule(mixer: nn.Module, hidden_BTE: Tensor, chunk: int) -> Tensor:
    """Return the output of a Gated DeltaNet mixer on whole rows: its own parameters, `delta_rule` for its recurrence."""
    batch, length, _ = hidden_BTE.shape
    mixed = convolve(mixer.conv1d, mixer.in_proj_qkv(hidden_BTE))
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    decay = F.softplus(mixer.in_proj_a(hidden_BTE).to(mixer.dt_bias.dtype) + mixer.dt_bias)
    o = delta_rule(
        q.reshape(batch, length, -1, mixer.head_k_dim),
        k.reshape(batch, length, -1, mixer.head_k_dim),
        v.reshape(batch, length, -1, mixer.head_v_dim),
        -mixer.A_log.exp() * decay,
        mixer.in_proj_b(hidden_BTE).sigmoid(),
        chunk=chunk,
    )
    gate = mixer.in_proj_z(hidden_BTE).reshape(o.shape)
    return mixer.out_proj(mixer.norm(o, gate).reshape(batch, length, -1))


def rotate(x_BHTK: Tensor, cos_1TK: Tensor, sin_1TK: Tensor) -> Tensor:
    """Return queries or keys with rotary positions: channel i turns with channel i + K/2."""
    half = x_BHTK.shape[-1] // 2
    turned = torch.cat([-x_BHTK[..., half:], x_BHTK[..., :half]], dim=-1)
    return x_BHTK * cos_1TK[:, None] + turned * sin_1TK[:, None]


def mix_by_attention(attention: nn.Module, hidden_BTE: Tensor, cos_1TK: Tensor, sin_1TK: Tensor) -> Tensor:
    """Return the output of a causal attention with rotary positions on whole rows; gated with normed q and k if it has norms."""
    batch, length, _ = hidden_BTE.shape
    q, k, v = (
        projection(hidden_BTE).view(batch, length, -1, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    is_gated = "q_norm" in attention._modules
    if is_gated:
        # Every head's query is followed by the gate of its output.
        q, gate = q[:, :, ::2], q[:, :, 1::2]
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (rotate(x.transpose(1, 2), cos_1TK, sin_1TK).to(v.dtype) for x in (q, k))
    k, v = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (k, v.transpose(1, 2)))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    if is_gated:
        mixed = mixed * torch.sigmoid(gate.reshape(batch, length, -1))
    return attention.o_proj(mixed)


def granite_layer(layer: nn.Module, hidden_BTE: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> Tensor:
    """Return the residual stream after a layer of Granite hybrid: Mamba-2 or attention, then the MLP."""
    normed = layer.input_layernorm(hidden_BTE)
    if layer.mamba is not None:
        hidden_BTE = hidden_BTE + mix_by_scan(layer.mamba, normed, chunk)
    else:
        hidden_BTE = hidden_BTE + mix_by_attention(layer.self_attn, normed, cos, sin)
    return hidden_BTE + layer.shared_mlp(layer.post_attention_layernorm(hidden_BTE))


def falcon_layer(layer: nn.Module, hidden_BTE: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> Tensor:
    """Return the residual stream after a layer of Falcon-H1: Mamba-2 beside attention, then the MLP."""
    normed = layer.input_layernorm(hidden_BTE)
    hidden_BTE = (
        hidden_BTE + mix_by_scan(layer.mamba, normed, chunk) + mix_by_attention(layer.self_attn, normed, cos, sin)
    )
    return hidden_BTE + layer.feed_forward(layer.pre_ff_layernorm(hidden_BTE))


def named_layer(layer: nn.Module, hidden_BTE: Tensor, cos: Tensor, sin: Tensor, chunk: int) -> Tensor:
    """Return the residual stream after a layer that has Gated DeltaNet, attention or both, by their names, then an MLP."""
    normed = layer.input_layernorm(hidden_BTE)
    if "linear_attn" in layer._modules:
        hidden_BTE = hidden_BTE + mix_by_delta_rule(layer.linear_attn, normed, chunk)
    if "self_attn" in layer._modules:
        hidden_BTE = hidden_BTE + mix_by_attention(layer.self_attn, normed, cos, sin)
    return hidden_BTE + layer.mlp(layer.post_attention_layernorm(hidden_BTE))


LAYERS: dict[str, Callable[..., Tensor]] = {
    "granitemoehybrid": granite_layer,
    "falcon_h1": falcon_layer,
    "qwen3_5_text": named_layer,
    "parallel_gated_delta": named_layer,
    "llama": named_layer,
}


def head_logits(norm: nn.Module, head: nn.Module, hidden_BTE: Tensor) -> Tensor:
    """Return logits in at least fp32."""
    logits = head(norm(hidden_BTE))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_loss(norm: nn.Module, head: nn.Module, hidden_BTE: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the mean cross entropy in nats."""
    return F.cross_entropy(head_logits(norm, head, hidden_BTE).flatten(0, 1), targets_BT.flatten())


class MatchedForward:
    """A sister's forward on whole rows without cache or padding; parameters stay those of the standard model.

    Each kind of layer is compiled once. Raises `ConfigError` for a model whose layers compute something else.
    """

    def __init__(self, model: PreTrainedModel, *, chunk: int, is_compiled: bool) -> None:
        check_neutral(model.config)
        compiled: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if is_compiled else (lambda f: f)
        self.model = model
        self.chunk = chunk
        self.is_compiled = is_compiled
        self.layer = compiled(LAYERS[model.config.model_type])
        self.head_loss = compiled(head_loss)
        body = model.model
        self.norm = body.final_layernorm if model.config.model_type == "falcon_h1" else body.norm

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the residual stream after the last layer."""
        body = self.model.model
        hidden = body.embed_tokens(ids_BT)
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        with torch.no_grad():
            cos, sin = body.rotary_emb(hidden, positions)
        for layer in body.layers:
            hidden = self.layer(layer, hidden, cos, sin, self.chunk)
        return hidden

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return logits in at least fp32."""
        return head_logits(self.norm, self.model.lm_head, self.hidden(ids_BT))

    def loss(self, rows_BT: Tensor) -> Tensor:
        """Return the mean next-token loss of rows of T + 1 tokens."""
        return self.head_loss(self.norm, self.model.lm_head, self.hidden(rows_BT[:, :-1]), rows_BT[:, 1:])


def check_neutral(config: Any) -> None:
    """Raise `ConfigError` when a config asks for something that the layers above leave out."""
    if config.model_type not in LAYERS:
        raise ConfigError(f"model_type: got {config.model_type!r}; the sisters are {', '.join(LAYERS)}.")
    for key, value in NEUTRAL[config.model_type].items():
        found = getattr(config, key)
        if (list(found) if isinstance(found, (list, tuple)) else found) != value:
            raise ConfigError(f"{config.model_type}.{key}: got {found!r}; the matched sisters have {value!r}.")
    if LAYERS[config.model_type] is named_layer and config.model_type != "llama":
        heads = config.linear_num_key_heads, config.linear_num_value_heads
        if heads[0] != heads[1]:
            raise ConfigError(
                f"linear_num_key_heads, linear_num_value_heads: got {heads}; the sisters have equal numbers."
            )
        rotary = config.rope_parameters.get("partial_rotary_factor", 1.0)
        if rotary != 1.0:
            raise ConfigError(f"partial_rotary_factor: got {rotary}; the sisters rotate all channels (1.0).")
