"""SDT: a few entries of the recurrence's own tensors, by channel and state, as fp32 deltas on the frozen values.

Source: Galim, Kang, Zeng, Koo and Lee, "Parameter-Efficient Fine-Tuning of State Space Models", ICML 2025, section 5,
with the rounding of the released code. Three parts, by the role of the tensor:
    entries   A [channels, states] (S4D: and the readout C): kept channels, and in each its kept states
    columns   B and C rows of x_proj [states, channels]: all rows of the columns that read kept channels
    rows      Mamba-2's dt rows, Gated DeltaNet's a and b rows [heads, inputs]: the rows of kept heads
The first two are the paper's. `rows`, with A_log [heads] as entries without states, is our port: a head is what a
channel is there, and these rows are what sets its step. docs/methods/sdt.md has the rule of selection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pydantic

from ssmtune.config import STRICT
from ssmtune.errors import ConfigError
from ssmtune.methods.base import Method, Rows
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.component import Component

Part = Literal["entries", "columns", "rows"]

DECAYS = ("ssm.A_log", "gdn.A_log", "ssm.log_A_real", "ssm.A_imag")
"""Roles of A, which decide what is kept in a layer."""
PARTS: dict[str, Part] = {
    **dict.fromkeys((*DECAYS, "ssm.C"), "entries"),
    **dict.fromkeys(("ssm.x_proj.B", "ssm.x_proj.C"), "columns"),
    **dict.fromkeys(("ssm.in.dt", "gdn.in.a", "gdn.in.b"), "rows"),
}


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class SdtOptions:
    """How much is frozen, and how what is kept is chosen.

    `selection`: by the change of A in a warm-up of `warmup_steps` steps, which only `train` can run; at random, with
    `seed`; or by the size of A. `part` is set by the plan.
    """

    channel_freeze_ratio: float = pydantic.Field(default=0.99, ge=0)
    state_freeze_ratio: float = pydantic.Field(default=0.75, ge=0)
    selection: Literal["warmup", "random", "magnitude"] = "magnitude"
    warmup_steps: int = pydantic.Field(default=250, ge=1)
    seed: int = 0
    part: Part | None = None


def num_kept(size: int, freeze_ratio: float) -> int:
    """Channels or states of `size` that train: what rounding leaves over, and always one."""
    return max(1, size - round(freeze_ratio * size))


def split_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (channels, states, numbers per state) of a tensor of entries; axes of size 1 around them do not count.

    >>> split_shape((1536, 16)), split_shape((64, 8, 2)), split_shape((1, 1, 32, 1))
    ((1536, 16, 1), (64, 8, 2), (32, 1, 1))
    """
    sizes = list(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    return sizes[0], sizes[1] if len(sizes) > 1 else 1, math.prod(sizes[2:])


def _num_params(shape: Sequence[int], options: SdtOptions) -> int:
    ratio = options.channel_freeze_ratio
    if options.part == "columns":
        return shape[0] * num_kept(shape[1], ratio)
    if options.part == "rows":
        return num_kept(shape[0], ratio) * shape[1]
    channels, states, numbers = split_shape(shape)
    return num_kept(channels, ratio) * num_kept(states, options.state_freeze_ratio) * numbers


def _at(component: Component, options: SdtOptions) -> SdtOptions:
    """The options with the part that the component's role makes it. Raises `ConfigError` for ratios that keep nothing."""
    for name in ("channel_freeze_ratio", "state_freeze_ratio"):
        value = getattr(options, name)
        if value >= 1:
            raise ConfigError(
                f"sdt, {name}: got {value}, which freezes everything, so nothing would train. Choose a ratio from 0 to below 1."
            )
    return replace(options, part=PARTS[component.role])


def _make_edit(weight: torch.Tensor, rows: Rows, options: SdtOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    import torch

    from ssmtune.methods._sparse import Sparse

    num_rows = weight.shape[0] if rows is None else sum(end - first for first, end in rows)
    num = _num_params((num_rows, *weight.shape[1:]), options)
    # The core stays fp32 up to the scan (docs/methods/core.md); a projection is multiplied in the model's own dtype.
    return Sparse(weight, rows, num=num, dtype=torch.float32 if options.part == "entries" else weight.dtype)


OUTPUT = Edit(method="lora", select=("ssm.out|gdn.out",), options={"rank": 8, "alpha": 8.0, "dropout": 0.1})
"""The companion of the released configs: LoRA on the recurrence's output projection."""

METHOD = Method(
    in_module=False,
    summary="A few entries of A (S4D: and C), and the B, C, dt or gate weights of the same channels, as fp32 deltas.",
    formula="ch st for A, rows ch for B and C, ch inputs for dt and gates; ch, st: kept channels and states",
    source="Galim et al. 2025 (SDT), section 5; on Mamba-2 and Gated DeltaNet the port is ours",
    mergeable=True,
    overhead="none once merged",
    Options=SdtOptions,
    # Zamba's A_log [heads, channels, states] has an axis more than the rule of selection.
    allows=lambda c: c.role in PARTS and not (c.role in DECAYS and len(c.shape) == 3),
    num_params=_num_params,
    at=_at,
    optimizer_group="core",
    make_edit=_make_edit,
    value_kind="sparse",
    recipes={
        name: (Edit(method="sdt", select=("allowed",), options={"selection": selection}), OUTPUT)
        for name, selection in (
            ("sdt", "warmup"),
            ("control:sdt-random", "random"),
            ("control:sdt-magnitude", "magnitude"),
        )
    },
)
