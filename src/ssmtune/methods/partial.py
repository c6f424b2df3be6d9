"""Partial tuning: whole small tensors (convolution, norms, biases) trained as fp32 deltas on the frozen values.

Source: Yoshimura et al., "MambaPEFT", ICLR 2025, section 3 ("partial tuning"); Ben Zaken et al., "BitFit", ACL 2022, for
biases alone. Weight decay then pulls the change to zero and not the weight, which is MambaPEFT's own variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssmtune.methods.base import Method, NoOptions, Rows, num_elements
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component


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
    Options=NoOptions,
    allows=_allows,
    num_params=num_elements,
    optimizer_group="core",
    make_edit=_make_edit,
    value_kind="delta",
    recipes={
        name: (Edit(method="partial", select=(selected,)),)
        for name, selected in (("bitfit", "biases"), ("norm", "norm"), ("conv", "conv"))
    },
)
