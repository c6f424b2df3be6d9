"""Qwen3.5 language models (`qwen3_5_text`, `qwen3_5_moe_text`): Gated DeltaNet or gated attention, then an MLP or experts."""

from __future__ import annotations

from ssmtune.families._gated_delta import deltanet_operations, deltanet_states
from ssmtune.families._qwen3 import HANDLED_CONFIG, claims
from ssmtune.families._qwen3_5 import ENTRY_ROWS, IN_PROJECTIONS, RECURRENT_CLASSES, text_configs
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Family

FAMILY = Family(
    model_types=("qwen3_5_text", "qwen3_5_moe_text"),
    topology="sequential",
    backbone="model",
    recurrent_classes=RECURRENT_CLASSES,
    operations=deltanet_operations,
    states=deltanet_states,
    entry_rows=ENTRY_ROWS,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=text_configs,
    claims=claims("model", IN_PROJECTIONS),
    handled_config=HANDLED_CONFIG,
)
