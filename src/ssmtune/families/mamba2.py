"""Mamba-2 (`mamba2`): a mixer in every layer and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._mamba2 import GATED_NORM, Sizes, entry_rows, mixer_claims, operations, states
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYER = "backbone.layers.{layer}."


def _sizes(config: Any) -> Sizes:
    return Sizes(
        inner=int(config.expand * config.hidden_size),
        states=config.n_groups * config.state_size,
        heads=config.num_heads,
    )


def _prepare_packed(model: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """Hand `seq_idx` to the backbone of this one call: its layers pass it on, but the model does not pass it to them."""

    def give_documents(backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hook.remove()
        return args, {**kwargs, "seq_idx": seq_idx}

    hook = model.get_submodule("backbone").register_forward_pre_hook(give_documents, with_kwargs=True, prepend=True)
    return {}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Mamba2Config

    make = partial(
        Mamba2Config,
        vocab_size=97,
        num_hidden_layers=2,
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=16,
        n_groups=1,
        chunk_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "tied": make(tie_word_embeddings=True),
        "odd": make(
            hidden_size=24,
            num_heads=6,
            state_size=5,
            n_groups=2,
            conv_kernel=3,
            use_bias=True,
            time_step_limit=(0.001, 5.0),
            residual_in_fp32=False,
        ),
        "one-layer": make(num_hidden_layers=1, expand=1, num_heads=4, n_groups=4, use_conv_bias=False),
    }


FAMILY = Family(
    model_types=("mamba2",),
    topology="pure",
    backbone="",
    cache="cache_params",
    recurrent_classes=("Mamba2Mixer",),
    operations=operations,
    states=states,
    gated_norm=GATED_NORM,
    state_size="state_size",
    entry_rows=entry_rows,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="backbone.embeddings.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        Claim(path="backbone.norm_f.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "norm.weight", role="norm.mixer", group="norm"),
        *mixer_claims(LAYER + "mixer", _sizes),
    ),
    # Not hidden_act: the convolution's activation is SiLU.
    handled_config=frozenset(
        """
        vocab_size hidden_size num_hidden_layers num_heads head_dim state_size n_groups expand conv_kernel chunk_size
        use_bias use_conv_bias layer_norm_epsilon residual_in_fp32 time_step_limit tie_word_embeddings
        """.split()
        # Only for the first values of the weights.
        + "time_step_rank time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme".split()
        + ["rescale_prenorm_residual"]
        # In published configs, and read by no layer of transformers, which always normalises after the gate.
        + "intermediate_size fused_add_norm rms_norm norm_before_gate".split()
    ),
)
