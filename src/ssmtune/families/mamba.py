"""Mamba (`mamba`): every layer is one Mamba-1 mixer, without attention or MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._pure_mamba import pure_family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import MambaConfig

    make = partial(
        MambaConfig, vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0, eos_token_id=2
    )
    return {
        "tied": make(),
        "biases": make(
            hidden_size=24,
            state_size=5,
            conv_kernel=3,
            time_step_rank=3,
            use_bias=True,
            residual_in_fp32=False,
            tie_word_embeddings=False,
        ),
        "no-conv-bias": make(num_hidden_layers=1, expand=3, use_conv_bias=False),
    }


FAMILY = pure_family(
    model_type="mamba",
    mixer="MambaMixer",
    state_size="state_size",
    tiny_configs=_tiny_configs,
    # Left in converted checkpoints by the original implementation; transformers reads none of them.
    handled_config=frozenset("d_inner d_model n_layer fused_add_norm rms_norm pad_vocab_size_multiple ssm_cfg".split()),
)
