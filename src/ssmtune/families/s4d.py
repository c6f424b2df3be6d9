"""S4D (`s4d`, `ssmtune.s4d_model`): linear time-invariant state-space layers, the model of controlled studies.

Nothing depends on the input, so all that defines the recurrence is core, the readout C among it.
The model is ours: it keeps documents and padding apart by itself, and no operation is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmtune.families._transformer import EMBEDDINGS, LAYER, linear
from ssmtune.families.base import Claim, Family

if TYPE_CHECKING:
    import torch
    from torch import nn


def _prepare_packed(backbone: nn.Module, position_ids: torch.Tensor, seq_idx: torch.Tensor) -> Mapping[str, Any]:
    return {"seq_idx": seq_idx}


def _tiny_configs() -> Mapping[str, Any]:
    from ssmtune.s4d_model import S4DConfig, register_s4d

    register_s4d()
    make = partial(S4DConfig, vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    return {
        "dense": make(tie_word_embeddings=True),
        "no-bias": make(projection_bias=False, hidden_act="relu"),
        "odd": make(num_hidden_layers=1, hidden_size=23, state_size=3),
    }


FAMILY = Family(
    model_types=("s4d",),
    topology="pure",
    backbone="model",
    cache="state",
    recurrent_classes=("S4DMixer",),
    takes_prompt=False,
    prepare_packed=_prepare_packed,
    tiny_configs=_tiny_configs,
    claims=(
        *EMBEDDINGS,
        Claim(path="model.norm.weight", role="norm.final", group="norm"),
        Claim(path=LAYER + "norm.weight", role="norm.mixer", group="norm"),
        *(
            Claim(path=f"{LAYER}mixer.{name}", role=f"ssm.{name}", group="core", access="parameter")
            for name in ("log_dt", "log_A_real", "A_imag", "C", "D")
        ),
        *linear(LAYER + "mixer.out_proj", "ssm.out", "recurrent"),
    ),
    handled_config=frozenset(
        """
        vocab_size hidden_size num_hidden_layers state_size hidden_act projection_bias norm_eps dt_min dt_max
        tie_word_embeddings
        """.split()
    ),
)
