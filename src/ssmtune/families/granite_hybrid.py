"""Granite 4 hybrids (`granitemoehybrid`): Mamba-2 or attention in each layer, then an MLP, optionally with experts beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

LAYER = "model.layers.{layer}."


def _in_proj_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """Rows of `in_proj` in order: gate z, input x, B, C, step size dt (Mamba-2 layout)."""
    inner = int(config.mamba_expand * config.hidden_size)
    state = config.mamba_n_groups * config.mamba_d_state
    return (
        ("ssm.in.z", inner),
        ("ssm.in.x", inner),
        ("ssm.in.B", state),
        ("ssm.in.C", state),
        ("ssm.in.dt", config.mamba_n_heads),
    )


def _conv_rows(config: Any) -> tuple[tuple[str, int], ...]:
    """Channels of the depthwise convolution: those of x, B and C."""
    rows = dict(_in_proj_rows(config))
    return tuple((f"ssm.conv.{part}", rows[f"ssm.in.{part}"]) for part in ("x", "B", "C"))


def _gate_up_rows(config: Any) -> tuple[tuple[str, int], ...]:
    return (("mlp.gate", config.shared_intermediate_size), ("mlp.up", config.shared_intermediate_size))


def _operations(module: nn.Module) -> Mapping[str, Callable[..., Any]]:
    """Our functions under the names that the layer's forward calls, with the argument conventions of that forward."""
    from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
    from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan
    from ssmtune.ops.selective_state_update import selective_state_update

    limit: Any = module.time_step_limit

    def conv(x: Any, weight: Any, bias: Any = None, activation: Any = None, **extra: Any) -> Any:
        return causal_conv1d(
            x, weight, bias, activation, seq_idx=extra.get("seq_idx"), padding_mask=extra.get("padding_mask")
        )

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, *, return_final_states: bool, **extra: Any) -> Any:
        y, final = mamba2_chunk_scan(
            x,
            dt,
            A,
            B,
            C,
            D_H=extra["D"],
            dt_bias_H=extra["dt_bias"],
            initial_states_BHPN=extra["initial_states"],
            dt_softplus=extra["dt_softplus"],
            dt_limit=extra["dt_limit"] or (0.0, math.inf),
            seq_idx=extra.get("seq_idx"),
            padding_mask=extra.get("padding_mask"),
        )
        return (y, final) if return_final_states else y

    def step(
        state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *, dt_bias: Any, dt_softplus: bool, **_: Any
    ) -> Any:
        # The forward expands per-head values over the head width and state; each copy is the same, so one is taken.
        # It also forgets the limit on dt here, so that decoding would differ from prefill; it is given again.
        return selective_state_update(
            state,
            x,
            dt[:, :, 0],
            A[:, 0, 0],
            B,
            C,
            D_H=D[:, 0],
            dt_bias_H=dt_bias[:, 0],
            dt_softplus=dt_softplus,
            dt_limit=limit or (0.0, math.inf),
        )

    return {
        "causal_conv1d_fn": conv,
        "causal_conv1d_update": causal_conv1d_update,
        "mamba2_chunk_scan": scan,
        "mamba2_selective_state_update": step,
        # The fused operation would swallow out_proj and the gated norm; None makes the forward take its other branch.
        "mamba2_split_conv1d_scan_combined": _declined,
    }


def _declined(*_: Any, **__: Any) -> None:
    return None


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    """The model does not hand `position_ids` to its causal mask, so its attention would leak: build the mask here."""
    from transformers.masking_utils import create_causal_mask

    weight: Any = backbone.get_submodule("embed_tokens").weight
    shape_only = weight.new_empty(*position_ids.shape, 1)
    mask = create_causal_mask(
        config=backbone.config,
        inputs_embeds=shape_only,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
    return {"attention_mask": {"full_attention": mask, "linear_attention": None}, "seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import GraniteMoeHybridConfig

    make = partial(
        GraniteMoeHybridConfig,
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        shared_intermediate_size=24,
        intermediate_size=20,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_chunk_size=16,
        embedding_multiplier=2.0,
        attention_multiplier=0.125,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        "dense": make(num_hidden_layers=3, layer_types=["linear_attention", "full_attention", "linear_attention"]),
        "moe": make(
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
        ),
        "odd": make(
            num_hidden_layers=2,
            layer_types=["full_attention", "linear_attention"],
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            mamba_n_heads=6,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_state=5,
            mamba_proj_bias=True,
            attention_bias=True,
            time_step_limit=(0.001, 5.0),
            position_embedding_type="rope",
        ),
        "no-conv-bias": make(
            num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], mamba_conv_bias=False
        ),
    }


FAMILY = Family(
    model_types=("granitemoehybrid",),
    topology="sequential",
    backbone="model",
    recurrent_module=LAYER + "mamba",
    operations=_operations,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        Claim(path="model.embed_tokens.weight", role="embed.tokens", group="embedding"),
        Claim(path="lm_head.weight", role="embed.head", group="embedding"),
        Claim(path="model.norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "input_layernorm.weight", role="norm.mixer", group="norm"),
        Claim(path=LAYER + "post_attention_layernorm.weight", role="norm.mlp", group="norm"),
        Claim(path=LAYER + "self_attn.q_proj.weight", role="attn.q", group="attention"),
        Claim(path=LAYER + "self_attn.k_proj.weight", role="attn.k", group="attention"),
        Claim(path=LAYER + "self_attn.v_proj.weight", role="attn.v", group="attention"),
        Claim(path=LAYER + "self_attn.o_proj.weight", role="attn.o", group="attention"),
        Claim(path=LAYER + "self_attn.q_proj.bias", role="attn.q.bias", group="attention"),
        Claim(path=LAYER + "self_attn.k_proj.bias", role="attn.k.bias", group="attention"),
        Claim(path=LAYER + "self_attn.v_proj.bias", role="attn.v.bias", group="attention"),
        Claim(path=LAYER + "self_attn.o_proj.bias", role="attn.o.bias", group="attention"),
        Claim(path=LAYER + "mamba.in_proj.weight", role="ssm.in", group="recurrent", rows=_in_proj_rows),
        Claim(path=LAYER + "mamba.in_proj.bias", role="ssm.in.bias", group="recurrent", rows=_in_proj_rows),
        Claim(path=LAYER + "mamba.out_proj.weight", role="ssm.out", group="recurrent"),
        Claim(path=LAYER + "mamba.out_proj.bias", role="ssm.out.bias", group="recurrent"),
        Claim(path=LAYER + "mamba.conv1d.weight", role="ssm.conv", group="conv", access="parameter", rows=_conv_rows),
        Claim(
            path=LAYER + "mamba.conv1d.bias", role="ssm.conv.bias", group="conv", access="parameter", rows=_conv_rows
        ),
        Claim(path=LAYER + "mamba.A_log", role="ssm.A_log", group="core", access="parameter"),
        Claim(path=LAYER + "mamba.D", role="ssm.D", group="core", access="parameter"),
        Claim(path=LAYER + "mamba.dt_bias", role="ssm.dt_bias", group="core", access="parameter"),
        Claim(path=LAYER + "mamba.norm.weight", role="ssm.norm", group="norm"),
        Claim(path=LAYER + "shared_mlp.input_linear.weight", role="mlp.in", group="mlp", rows=_gate_up_rows),
        Claim(path=LAYER + "shared_mlp.output_linear.weight", role="mlp.out", group="mlp"),
        Claim(path=LAYER + "block_sparse_moe.router.weight", role="moe.router", group="mlp"),
        Claim(
            path=LAYER + "block_sparse_moe.experts.gate_up_proj", role="moe.experts.in", group="mlp", access="parameter"
        ),
        Claim(
            path=LAYER + "block_sparse_moe.experts.down_proj", role="moe.experts.out", group="mlp", access="parameter"
        ),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
        rms_norm_eps tie_word_embeddings rope_parameters rope_theta attention_bias embedding_multiplier logits_scaling
        residual_multiplier attention_multiplier num_local_experts num_experts_per_tok output_router_logits
        router_aux_loss_coef shared_intermediate_size position_embedding_type layer_types layers_block_type mamba_n_heads
        mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
        mamba_proj_bias time_step_limit
        """.split()
    ),
)
