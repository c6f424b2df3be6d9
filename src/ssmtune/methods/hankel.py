"""Hankel reduced-order adapter: a small linear time-invariant system parallel to an MLP or attention block.

Source: Thapliyal, "HRM adapter", arXiv 2606.26290 (2026). out = block(x) + g SSM(x), where the SSM has n modes, is
discretised by zero-order hold and runs in fp32. Two things differ from the released code: the step size is bounded
smoothly instead of by a clamp that ends its gradient, and a truncated system is stored as itself
(`ssmtune.balanced_truncation`), never as the full one.
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
class HankelOptions:
    """Order n, and how the system starts.

    `complex_modes` makes n / 2 conjugate pairs (S4D-Lin) of the n real modes (S4D-real): real modes decay and cannot
    alternate, which parity and periodic tasks need. `zero_output` starts C at zero, as LoRA does, which needs a gate
    other than zero: with both at zero nothing would ever get a gradient. `backend` evaluates whole rows; packed rows
    are always scanned.
    """

    order: int = pydantic.Field(default=32, ge=1)
    complex_modes: bool = False
    gate: Literal["scalar", "channel"] = "scalar"
    init_gate: float = 0.0
    zero_output: bool = False
    backend: Literal["fft", "scan"] = "fft"

    @pydantic.model_validator(mode="after")
    def _can_learn(self) -> HankelOptions:
        if self.zero_output and self.init_gate == 0:
            raise ValueError(
                "gate and C both start at zero, so no gradient would ever flow; set init_gate, or zero_output false"
            )
        if self.complex_modes and self.order % 2:
            raise ValueError(f"complex modes come in pairs: order {self.order} is odd; make it even")
        return self


def _num_params(shape: Sequence[int], options: HankelOptions) -> int:
    """2 n d + 2 n real modes, or 3 numbers for each of n / 2 pairs, and the gates."""
    modes = 3 * options.order // 2 if options.complex_modes else 2 * options.order
    return 2 * options.order * shape[0] + modes + (1 if options.gate == "scalar" else shape[0])


def _make_branch(shape: Sequence[int], options: HankelOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    import torch

    from ssmtune.methods._branch import Branch
    from ssmtune.methods._dynamics import ContinuousModes

    modes = ContinuousModes(options.order, complex_modes=options.complex_modes, backend=options.backend)
    gates = 1 if options.gate == "scalar" else shape[0]
    branch = Branch(shape[0], options.order, modes, gates=gates, start=options.init_gate)
    if options.zero_output:
        torch.nn.init.zeros_(branch.C)
    return branch


METHOD = Method(
    in_module=False,
    summary="A linear time-invariant system of order n parallel to a block: B, C, modes, step sizes and a gate.",
    formula="2 n d + 2 n + 1 (complex modes: 2 n d + 3 n / 2 + 1; a gate per channel: d in place of 1)",
    source="Thapliyal 2026 (HRM adapter), section 3, with the bounds of the step size smooth",
    mergeable=False,
    overhead="4 n d FLOPs per token and block, and a state of n numbers per block in generation",
    at_every_token="runs a module beside a block, with a memory that no cache of transformers keeps",
    Options=HankelOptions,
    allows=lambda component: component.group == "block",
    num_params=_num_params,
    optimizer_group="state",
    make_branch=_make_branch,
    value_kind="absolute",
    recipes={"hankel": (Edit(method="hankel", select=("block.mlp",)),)},
)
