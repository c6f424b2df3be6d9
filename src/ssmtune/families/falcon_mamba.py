"""Falcon-Mamba (`falcon_mamba`): Mamba with norms on dt, B and C that have no weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ssmtune.families._pure_mamba import pure_family


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import FalconMambaConfig

    make = partial(
        FalconMambaConfig,
        vocab_size=97,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return {
        # The published model, too, says an `expand` that its intermediate_size does not follow.
        "untied": make(expand=16, intermediate_size=56, time_step_rank=6, tie_word_embeddings=False),
        "biases": make(
            hidden_size=24, state_size=5, time_step_rank=5, use_bias=True, residual_in_fp32=False, mixer_rms_eps=1e-3
        ),
        "no-conv-bias": make(num_hidden_layers=1, conv_kernel=2, time_step_rank=6, use_conv_bias=False),
    }


FAMILY = pure_family(
    model_type="falcon_mamba",
    mixer="FalconMambaMixer",
    tiny_configs=_tiny_configs,
    handled_config=frozenset({"mixer_rms_eps"}),
)
