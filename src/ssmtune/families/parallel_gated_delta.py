"""Parallel Gated DeltaNet (`parallel_gated_delta`, `ssmtune.parallel_gated_delta_model`): both mixers in every layer.

Its layers are Qwen3.5's, under the same names, so claims, operations and states are those of that family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmtune.families._gated_delta import deltanet_operations, deltanet_states
from ssmtune.families._qwen3 import HANDLED_CONFIG, claims, tiny
from ssmtune.families._qwen3_5 import ENTRY_ROWS, IN_PROJECTIONS, ODD_SIZES
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Family


def _tiny_configs() -> Mapping[str, Any]:
    from ssmtune.parallel_gated_delta_model import ParallelGatedDeltaConfig, register_parallel_gated_delta

    register_parallel_gated_delta()
    make = tiny(ParallelGatedDeltaConfig, intermediate_size=40)
    return {
        "dense": make(num_hidden_layers=2, tie_word_embeddings=True),
        "equal-heads": make(num_hidden_layers=1, linear_num_value_heads=2),
        "odd": make(
            num_hidden_layers=1,
            **ODD_SIZES,
        ),
    }


FAMILY = Family(
    model_types=("parallel_gated_delta",),
    topology="parallel",
    backbone="model",
    recurrent_classes=("Qwen3_5GatedDeltaNet",),
    operations=deltanet_operations,
    states=deltanet_states,
    entry_rows=ENTRY_ROWS,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=tuple(claim for claim in claims("model", IN_PROJECTIONS) if not claim.role.startswith("moe.")),
    handled_config=HANDLED_CONFIG,
)
