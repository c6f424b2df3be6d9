"""What plain transformers share: the claims of a decoder with gated MLPs, and masks that keep packed documents apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.component import Group
from ssmtune.families.base import Claim

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYER = "model.layers.{layer}."


def linear(path: str, role: str, group: Group) -> tuple[Claim, Claim]:
    """Claims of a linear module: its weight, and its bias where the config gives it one."""
    return (
        Claim(path=f"{path}.weight", role=role, group=group),
        Claim(path=f"{path}.bias", role=f"{role}.bias", group=group),
    )


EMBEDDINGS = (
    Claim(path="model.embed_tokens.weight", role="embed.tokens", group="embedding"),
    Claim(path="lm_head.weight", role="embed.head", group="embedding"),
)

ATTENTION = tuple(
    claim for part in "qkvo" for claim in linear(f"{LAYER}self_attn.{part}_proj", f"attn.{part}", "attention")
)

TRANSFORMER = (
    *EMBEDDINGS,
    Claim(path="model.norm.weight", role="norm.final", group="norm"),
    Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
    Claim(path=LAYER + "post_attention_layernorm.weight", role="norm.mlp", group="norm"),
    *ATTENTION,
    *(claim for part in ("gate", "up", "down") for claim in linear(f"{LAYER}mlp.{part}_proj", f"mlp.{part}", "mlp")),
)
"""Attention and a gated MLP in every layer, a norm before each: Llama's names, which most models keep."""

TRANSFORMER_CONFIG = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    rms_norm_eps tie_word_embeddings rope_parameters rope_theta
    """.split()
)
"""Config attributes of such a decoder, all of which the claims and masks leave room for."""


def packed_mask(backbone: nn.Module, position_ids: torch.Tensor, *, sliding: bool = False) -> torch.Tensor | None:
    """Return the causal mask that keeps packed documents apart, inside the config's sliding window if `sliding`.

    `position_ids` [B, T] restart at each document. The mask has the form that the model's attention takes
    (None where that attention reads the position ids itself). Models build it too, but not while they fill a cache.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model: Any = backbone
    mask: torch.Tensor | None = (create_sliding_window_causal_mask if sliding else create_causal_mask)(
        config=model.config,
        inputs_embeds=model.get_input_embeddings().weight.new_empty(*position_ids.shape, 1),  # for its shape and dtype
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
    return mask


def prepare_packed_hybrid(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """Keep documents apart in attention by a mask, in the recurrent layers by `seq_idx`, which the layers hand on.

    The mask is built here, since some backbones do not give `position_ids` to theirs, and none does beside a cache.
    """
    masks = {"full_attention": packed_mask(backbone, position_ids), "linear_attention": None}
    return {"attention_mask": masks, "seq_idx": seq_idx}


def prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """`Family.prepare_packed` of a model whose layers all attend to everything before."""
    return {"attention_mask": packed_mask(backbone, position_ids)}
