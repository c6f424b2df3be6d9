"""Zamba (`zamba`): Mamba-1 with several heads in each layer, and one attention-and-MLP block that some layers share.

The shared block is claimed for the first layer that uses it; what it returns passes a linear of the layer's own and is
added to the input of that layer's Mamba mixer. transformers shares it only where word embeddings are tied as well, and
otherwise gives each of these layers a block of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ssmtune.families import _mamba1
from ssmtune.families._transformer import EMBEDDINGS, LAYER, linear, packed_mask
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call

SHARED = LAYER + "shared_transf."


def _in_proj_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """Rows of x and of its gate z alternate."""
    inner: int = config.mamba_expand * config.hidden_size
    return (("ssm.in.x", 1), ("ssm.in.z", 1)) * inner


def _mixer_claims(mixer: str) -> tuple[Claim, ...]:
    """x_proj and dt_proj are one tensor for all heads, [heads, out, in], that the forward multiplies by itself."""
    return (
        *_mamba1.scan_claims(mixer, in_rows=_in_proj_rows),
        Claim(path=mixer + "x_proj_weight", role="ssm.x_proj", group="recurrent", access="parameter"),
        Claim(path=mixer + "dt_proj_weight", role="ssm.dt_proj", group="recurrent", access="parameter"),
        Claim(path=mixer + "dt_proj_bias", role="ssm.dt_bias", group="core", access="parameter"),
    )


def _operations(module: nn.Module, call: Call) -> Mapping[str, Any]:
    """Mamba-1's functions, and a `torch` whose `cat` joins the heads so that out_proj gets a contiguous input.

    PyTorch sums a product with a strided input in an order that depends on what requires gradients.
    """
    import torch

    def cat(heads: list[torch.Tensor], dim: int) -> torch.Tensor:
        """[B, D / H, T] of each of the H heads -> [B, D, T], the transpose of a contiguous tensor."""
        assert dim == 1
        return torch.cat([head.transpose(1, 2) for head in heads], dim=-1).transpose(1, 2)

    return {**_mamba1.operations(module, call), "torch": SimpleNamespace(**{**vars(torch), "cat": cat})}


def _states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """As in Mamba-1, but for what is one for the mixer and not a head's own: B and C of an additional scan, membranes."""
    without = ("additional_scan", "membrane")
    return {name: shape for name, shape in _mamba1.states(module).items() if name not in without}


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    mask = packed_mask(backbone, position_ids)
    return {"attention_mask": {"full_attention": mask, "linear_attention": None}, "seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import ZambaConfig

    make = partial(
        ZambaConfig,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_d_state=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "shared": make(num_hidden_layers=3, layers_block_type=["linear_attention", "hybrid", "hybrid"]),
        "odd": make(
            num_hidden_layers=2,
            layers_block_type=["hybrid", "linear_attention"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            n_mamba_heads=3,
            mamba_d_state=5,
            mamba_d_conv=3,
            mamba_dt_rank=3,
            mamba_proj_bias=True,
            hidden_act="silu",
            tie_word_embeddings=False,
        ),
        "one-head": make(
            num_hidden_layers=2,
            layers_block_type=["hybrid", "hybrid"],
            n_mamba_heads=1,
            attention_head_dim=6,
            mamba_conv_bias=False,
        ),
    }


FAMILY = Family(
    model_types=("zamba",),
    topology="sequential",
    backbone="model",
    recurrent_classes=("ZambaMambaMixer",),
    operations=_operations,
    states=_states,
    blocks={"block.mlp": SHARED + "feed_forward", "block.attention": ""},
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.final_layernorm.weight", role="norm.final", group="norm"),
        Claim(path=SHARED + "input_layernorm.weight", role="norm.attn", group="norm"),
        Claim(path=SHARED + "pre_ff_layernorm.weight", role="norm.mlp", group="norm"),
        *(claim for part in "qkvo" for claim in linear(f"{SHARED}self_attn.{part}_proj", f"attn.{part}", "attention")),
        *(
            claim
            for part in ("gate", "up", "down")
            for claim in linear(f"{SHARED}feed_forward.{part}_proj", f"mlp.{part}", "mlp")
        ),
        *linear(LAYER + "linear", "shared.out", "mlp"),
        # A layer with the shared block keeps its Mamba part one module further down.
        *(
            claim
            for part in (LAYER, LAYER + "mamba_decoder.")
            for claim in (
                Claim(path=part + "input_layernorm.weight", role="norm.mixer", group="norm"),
                *_mixer_claims(part + "mamba."),
            )
        ),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size attention_hidden_size intermediate_size num_hidden_layers num_attention_heads
        attention_head_dim num_key_value_heads n_mamba_heads hidden_act rms_norm_eps tie_word_embeddings
        num_logits_to_keep attn_layer_period attn_layer_offset layers_block_type mamba_d_state mamba_d_conv mamba_expand
        mamba_dt_rank mamba_conv_bias mamba_proj_bias
        """.split()
        # How dt_proj is initialised, and which scan transformers would take.
        + "time_step_min time_step_max time_step_floor use_mamba_kernels use_associative_scan".split()
    ),
)
