"""Partial tuning: whole small tensors (convolution, norms, biases) trained as fp32 deltas on the frozen values.

Source: Yoshimura et al., "MambaPEFT", ICLR 2025, section 3 ("partial tuning"); Ben Zaken et al., "BitFit", ACL 2022, for
biases alone. MambaPEFT's second variant freezes the tensor and trains a change that decays strongly, so that decay pulls
to the pretrained value and not to zero. Here the change is always apart from the tensor; `decay="v2"` is that decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method, Rows, num_elements
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component


Decay = Literal["none", "v2"]
"""How the change decays: not at all, or as MambaPEFT's second variant."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class PartialOptions:
    """Whether the change decays, and so is pulled back to the pretrained value."""

    decay: Decay = "none"


def pull(role: str, decay: Decay) -> float:
    """Return the multiple of the base weight decay for the change of a tensor: with "v2" 100 for biases, 10 for all else.

    Source: Yoshimura et al., "MambaPEFT", ICLR 2025, and its released code.

    >>> pull("ssm.D", "v2"), pull("ssm.dt_bias", "v2"), pull("ssm.D", "none")
    (10.0, 100.0, 0.0)
    """
    if decay == "none":
        return 0.0
    return 100.0 if role.endswith("bias") else 10.0


def _allows(component: Component) -> bool:
    """Convolutions, norms and every bias, as whole tensors."""
    return component.rows is None and (
        component.group in ("conv", "norm")
        or (component.role.endswith(".bias") and component.group in ("attention", "recurrent", "mlp"))
    )


def _make_edit(weight: torch.Tensor, rows: Rows, options: object) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._delta import Delta

    assert rows is None
    return Delta(weight, dtype=weight.dtype)


METHOD = Method(
    in_module=False,
    summary="Convolutions, norms or biases as a whole, as fp32 deltas on the frozen values.",
    formula="number of elements",
    source="Yoshimura et al. 2025 (MambaPEFT), section 3; Ben Zaken et al. 2022 (BitFit)",
    mergeable=True,
    overhead="none once merged",
    Options=PartialOptions,
    allows=_allows,
    num_params=num_elements,
    optimizer_group="core",
    make_edit=_make_edit,
    value_kind="delta",
    decay_factor=lambda role, name, options: pull(role, options.decay),
    recipes={
        **{
            name: (Edit(method="partial", select=(selected,)),)
            for name, selected in (("bitfit", "biases"), ("norm", "norm"), ("conv", "conv"))
        },
        **{
            name: (Edit(method="partial", select=(selected,), options={"decay": "v2"}),)
            for name, selected in (("bitfit-v2", "biases"), ("conv-v2", "conv"))
        },
    },
)
