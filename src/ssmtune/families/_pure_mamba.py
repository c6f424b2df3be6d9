"""The models that are Mamba-1 mixers and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ssmtune.families import _mamba1
from ssmtune.families.base import Claim, Family
from ssmtune.packing import mark_documents

if TYPE_CHECKING:
    from torch import nn

    from ssmtune.ops.seam import Call

HANDLED_CONFIG = frozenset(
    """
    vocab_size hidden_size intermediate_size expand state_size conv_kernel num_hidden_layers layer_norm_epsilon use_bias
    use_conv_bias residual_in_fp32 tie_word_embeddings time_step_rank
    """.split()
    # How dt_proj and out_proj are initialised, and which scan transformers would take.
    + """
    time_step_scale time_step_min time_step_max time_step_floor time_step_init_scheme rescale_prenorm_residual use_mambapy
    use_associative_scan
    """.split()
)
"""Config attributes of such a model, all of which the claims and operations leave room for."""


def pure_family(
    *,
    model_type: str,
    mixer: str,
    tiny_configs: Callable[[], Mapping[str, Any]],
    handled_config: frozenset[str] = frozenset(),
    state_size: str | None = None,
) -> Family:
    """Return the family of a model whose layers are a Mamba-1 mixer of class `mixer` each, without attention or MLP.

    `handled_config` adds to the config attributes that such models share; `state_size` is `Family.state_size`.
    """
    layer = "backbone.layers.{layer}."
    return Family(
        model_types=(model_type,),
        topology="pure",
        # The inner model takes no position_ids: only here are they seen.
        backbone="",
        cache="cache_params",
        recurrent_classes=(mixer,),
        operations=_unfused_operations,
        states=_mamba1.states,
        state_size=state_size,
        entry_rows=_mamba1.entry_rows,
        # The layers are given the mask and nothing else.
        prepare_packed=lambda model, position_ids, seq_idx: {"attention_mask": mark_documents(seq_idx)},
        tiny_configs=tiny_configs,
        claims=(
            Claim(path="backbone.embeddings.weight", role="embed.tokens", group="embedding"),
            Claim(path="lm_head.weight", role="embed.head", group="embedding"),
            Claim(path="backbone.norm_f.weight", role="norm.final", group="norm"),
            Claim(path=layer + "norm.weight", role="norm.mixer", group="norm"),
            *_mamba1.mixer_claims(
                layer + "mixer.",
                in_rows=lambda config: _mamba1.in_proj_rows(config.intermediate_size),
                x_rows=lambda config: _mamba1.x_proj_rows(config.time_step_rank, config.state_size),
            ),
        ),
        handled_config=HANDLED_CONFIG | handled_config,
    )


def _unfused_operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    # The fused operation would swallow the convolution, x_proj, dt_proj and out_proj; None makes the forward take its
    # other branch.
    return {**_mamba1.operations(module, call), "mamba_inner_fn": _declined}


def _declined(*_: Any, **__: Any) -> None:
    return None
