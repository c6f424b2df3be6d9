"""RWKV-4 (`rwkv`): a decaying average of values weighted by keys (WKV), and an MLP, each fed with a shift by one token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._rwkv_layers import State, rwkv_methods, rwkv_operations
from ssmtune.families._transformer import linear
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = "rwkv.blocks.{layer}."
MIXER = BLOCK + "attention."
MLP = BLOCK + "feed_forward."


def _prepare_packed(model: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    return {"state": State(seq_idx=seq_idx)}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import RwkvConfig

    make = partial(RwkvConfig, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, eos_token_id=2)
    return {
        "dense": make(tie_word_embeddings=True),
        # The model's division by two is exact but for the norms' epsilon, which would hide a weight that is not divided.
        "rescaled": make(num_hidden_layers=3, rescale_every=2, layer_norm_epsilon=1e-8),
        "odd": make(hidden_size=24, intermediate_size=20, rescale_every=0),
    }


FAMILY = Family(
    model_types=("rwkv",),
    topology="pure",
    backbone="",
    cache="state",
    recurrent_classes=("RwkvForCausalLM", "RwkvSelfAttention", "RwkvFeedForward"),
    operations=rwkv_operations,
    methods=rwkv_methods,
    takes_prompt=False,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="rwkv.embeddings.weight", role="embed.tokens", group="embedding"),
        Claim(path="head.weight", role="embed.head", group="embedding"),
        *(
            Claim(path=f"{path}.{kind}", role=f"norm.{role}{suffix}", group="norm")
            for path, role in (
                ("rwkv.ln_out", "final"),
                (BLOCK + "pre_ln", "embed"),
                (BLOCK + "ln1", "mixer"),
                (BLOCK + "ln2", "mlp"),
            )
            for kind, suffix in (("weight", ""), ("bias", ".bias"))
        ),
        Claim(path=MIXER + "time_decay", role="rwkv.time_decay", group="core", access="parameter"),
        Claim(path=MIXER + "time_first", role="rwkv.time_first", group="core", access="parameter"),
        # The shares of this token and the one before: a convolution of two taps.
        *(
            Claim(path=f"{path}time_mix_{name}", role=f"{role}.time_mix.{name}", group="conv", access="parameter")
            for path, role, names in (
                (MIXER, "rwkv", ("key", "value", "receptance")),
                (MLP, "mlp", ("key", "receptance")),
            )
            for name in names
        ),
        *(
            claim
            for name in ("key", "value", "receptance", "output")
            for claim in linear(MIXER + name, f"rwkv.{name}", "recurrent")
        ),
        *linear(MLP + "key", "mlp.up", "mlp"),
        *linear(MLP + "value", "mlp.down", "mlp"),
        *linear(MLP + "receptance", "mlp.gate", "mlp"),
    ),
    handled_config=frozenset(
        """
        vocab_size context_length hidden_size num_hidden_layers attention_hidden_size intermediate_size layer_norm_epsilon
        rescale_every tie_word_embeddings
        """.split()
    ),
)
