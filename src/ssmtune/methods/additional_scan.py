"""Additional-scan: n further states beside the N of every Mamba recurrence, with their own decay, B and C.

Source: Yoshimura et al., "MambaPEFT", ICLR 2025, section 3 (additional-scan); Galim et al., ICML 2025, whose C starts at
zero. For Mamba-1; there the published starts of the decay are copies of a base state's. The Mamba-2 port is ours: rows of
in_proj and channels of the convolution for B and C of each group, the head's decay shared.
Without the norms that some models put on B and C. A model with N + n states computes the same (`widen`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdditionalScanOptions:
    """Number of further states, and in Mamba-1 where their decays start: going on as S4D-real's, or from a base state's."""

    num_states: int = pydantic.Field(default=8, ge=1)
    decay: Literal["continue", "copy_last", "copy_first"] = "continue"


def _num_params(shape: Sequence[int], options: AdditionalScanOptions) -> int:
    if len(shape) == 2:
        return 3 * options.num_states * shape[0]
    groups, width, taps, has_bias = shape
    return 2 * options.num_states * groups * (width + taps + has_bias)


def _make_state(shape: Sequence[int], options: AdditionalScanOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._extra_scan import Mamba1Scan, Mamba2Scan

    if len(shape) == 2:
        return Mamba1Scan(shape, num_states=options.num_states, decay=options.decay)
    return Mamba2Scan(shape, num_states=options.num_states)


METHOD = Method(
    in_module=False,
    summary="Further states of every Mamba recurrence, with their own decay (Mamba-1) and projections.",
    formula="Mamba-1: 3 n D_in; Mamba-2: 2 n G (d + K, + 1 with a convolution bias)",
    source="Yoshimura et al. 2025 (MambaPEFT), section 3; Galim et al. 2025",
    mergeable=False,
    overhead="n / N more state and scan",
    Options=AdditionalScanOptions,
    allows=lambda component: component.role == "state.additional_scan",
    num_params=_num_params,
    optimizer_group="state",
    make_state=_make_state,
    waits=("scan_A", "scan_B", "scan_conv"),
    needs="An additional scan needs Mamba-1 or Mamba-2 layers: in a gated delta rule further key dimensions would change "
    "the L2 norm of every query and key, and so the base model itself.",
    recipes={"additional-scan": (Edit(method="additional_scan", select=("state.additional_scan",)),)},
)
