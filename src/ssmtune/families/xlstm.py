"""xLSTM (`xlstm`): matrix memories with exponential gates (mLSTM), each followed by a gated MLP.

The gates are linears with a bias, so nothing is core: what sets how fast a head forgets is the forget gate's bias.
Only transformers' own layers: with the package `xlstm` installed transformers takes that package's, which differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._transformer import linear
from ssmtune.families._xlstm_layers import xlstm_methods, xlstm_states
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = "backbone.blocks.{layer}."
MIXER = BLOCK + "mlstm_layer."


def _prepare_packed(model: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    return {"seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import xLSTMConfig

    # transformers' own cache needs widths of queries and values that are multiples of 64.
    make = partial(
        xLSTMConfig,
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=4,
        qk_dim_factor=1.0,
        ffn_proj_factor=0.5,
        ffn_round_up_to_multiple_of=8,
    )
    return {
        "dense": make(),
        "biases": make(num_hidden_layers=1, num_heads=2, use_bias=True, v_dim_factor=2.0),
        "capped": make(num_hidden_layers=1, num_heads=1, gate_soft_cap=2.0, output_logit_soft_cap=3.0, eps=1e-3),
        "odd": make(num_hidden_layers=1, hidden_size=24, num_heads=3, qk_dim_factor=8.0, v_dim_factor=16.0),
    }


FAMILY = Family(
    model_types=("xlstm",),
    topology="pure",
    backbone="",
    cache="cache_params",
    recurrent_classes=("xLSTMForCausalLM", "xLSTMBackend"),
    methods=xlstm_methods,
    states=xlstm_states,
    takes_prompt=False,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="backbone.embeddings.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        *(
            claim
            for path, role in (
                ("backbone.out_norm", "norm.final"),
                (BLOCK + "norm_mlstm", "norm.mixer"),
                (BLOCK + "norm_ffn", "norm.mlp"),
                (MIXER + "multihead_norm", "mlstm.norm"),
            )
            for claim in linear(path, role, "norm")
        ),
        *(claim for part in "qkv" for claim in linear(MIXER + part, f"mlstm.{part}", "recurrent")),
        *linear(MIXER + "ogate_preact", "mlstm.output_gate", "recurrent"),
        *linear(MIXER + "out_proj", "mlstm.out", "recurrent"),
        *linear(MIXER + "igate_preact", "mlstm.input_gate", "recurrent"),
        *linear(MIXER + "fgate_preact", "mlstm.forget_gate", "recurrent"),
        *linear(BLOCK + "ffn.proj_up_gate", "mlp.gate", "mlp"),
        *linear(BLOCK + "ffn.proj_up", "mlp.up", "mlp"),
        *linear(BLOCK + "ffn.proj_down", "mlp.down", "mlp"),
    ),
    # Mode, kernels, chunk size and dtypes choose between implementations of what one operation of ours computes in fp32.
    handled_config=frozenset(
        """
        vocab_size hidden_size embedding_dim num_hidden_layers num_blocks num_heads use_bias norm_eps eps qk_dim_factor
        v_dim_factor ffn_proj_factor ffn_round_up_to_multiple_of gate_soft_cap output_logit_soft_cap
        norm_reduction_force_float32 mode chunkwise_kernel sequence_kernel step_kernel chunk_size return_last_states
        autocast_kernel_dtype inference_state_dtype max_inference_chunksize
        """.split()
    ),
)
