"""Qwen3.5 with its image tower (`qwen3_5`, `qwen3_5_moe`): the language model is adapted, the tower is left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmtune.families._gated_delta import deltanet_operations, deltanet_states, projections
from ssmtune.families._qwen3 import HANDLED_CONFIG, claims
from ssmtune.families._qwen3_5 import ENTRY_ROWS, IN_PROJECTIONS, RECURRENT_CLASSES, text_configs
from ssmtune.families._transformer import prepare_packed_hybrid
from ssmtune.families.base import Claim, Family

BACKBONE = "model.language_model"
TOWER = "model.visual."


def _tiny_configs() -> Mapping[str, Any]:
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig

    text = text_configs()
    tower = {
        "hidden_size": 8,
        "num_heads": 2,
        "intermediate_size": 12,
        "patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    }
    special = {"image_token_id": 93, "video_token_id": 94, "vision_start_token_id": 95, "vision_end_token_id": 96}
    return {
        # More blocks in the tower than layers in the language model: their numbers are not layers'.
        "dense": Qwen3_5Config(
            text_config=text["dense"].to_dict(),
            vision_config={**tower, "depth": 3},
            tie_word_embeddings=True,
            **special,
        ),
        "moe": Qwen3_5MoeConfig(text_config=text["moe"].to_dict(), vision_config={**tower, "depth": 1}, **special),
        "odd": Qwen3_5Config(
            text_config=text["odd"].to_dict(),
            vision_config={**tower, "depth": 1, "out_hidden_size": text["odd"].hidden_size},
            **special,
        ),
    }


FAMILY = Family(
    model_types=("qwen3_5", "qwen3_5_moe"),
    topology="sequential",
    backbone=BACKBONE,
    recurrent_classes=RECURRENT_CLASSES,
    operations=deltanet_operations,
    states=deltanet_states,
    entry_rows=ENTRY_ROWS,
    takes_prompt=False,
    prepare_packed=prepare_packed_hybrid,
    tiny_configs=_tiny_configs,
    claims=(
        *claims(BACKBONE, IN_PROJECTIONS),
        *projections(TOWER, {"patch_embed.proj": "image.patches"}, "other"),
        Claim(path=TOWER + "pos_embed.weight", role="image.positions", group="other"),
        *projections(
            TOWER + "blocks.{block}.",
            {
                "norm1": "image.norm.mixer",
                "norm2": "image.norm.mlp",
                "attn.qkv": "image.attn.in",
                "attn.proj": "image.attn.o",
                "mlp.linear_fc1": "image.mlp.up",
                "mlp.linear_fc2": "image.mlp.down",
            },
            "other",
        ),
        *projections(
            TOWER + "merger.",
            {"norm": "image.norm.final", "linear_fc1": "image.merger.up", "linear_fc2": "image.merger.down"},
            "other",
        ),
    ),
    # The tower's own config decides about the tower alone.
    handled_config=HANDLED_CONFIG
    | {"text_config", "vision_config"}
    | {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"},
)
