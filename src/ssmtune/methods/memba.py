"""Memba: leaky-integrate membranes on the gate z of every Mamba layer, beside LoRA on the input and output projections.

Source: Lee et al., "Memba", ICLR 2026 (arXiv 2506.18184), method section: the gate goes through a low-rank pair with
membranes between, u[i+1] = r(leak u[i] + W_in X[i]) from chunk to chunk, r(x) = 0 above a threshold. For Mamba-1.
The causal form here is ours. Its differences from what is known of the paper:

- u_t = r(leak u_{t-S} + W_in z_t) and z'_t = z_t + W_out u_t, with chunks of a fixed number S of tokens. The paper cuts
  each sequence into a fixed number of chunks, so that where a token lies would depend on how many follow.
- No transfer of a layer's mean membrane to the next: a mean over the sequence contains later tokens.
- W_out starts at zero and is added to z: the model starts as its base, and W_in waits for W_out.
- r jumps and is not smoothed: gradients are those of its pieces, one up to the threshold and zero where it resets.

Membranes are fp32, zero where a document begins, untouched by padding, and kept in the cache (S R numbers per layer).
The Mamba-2 port is ours: there the gate is the one that the gated norm takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pydantic

from ssmtune.config import STRICT
from ssmtune.methods.base import Method
from ssmtune.recipe import Edit

if TYPE_CHECKING:
    from torch import nn


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class MembaOptions:
    """Number of membranes R, tokens of a chunk S, and how a membrane leaks and resets."""

    rank: int = pydantic.Field(default=16, ge=1)
    chunk: int = pydantic.Field(default=8, ge=1)
    leak: float = pydantic.Field(default=0.9, gt=0, le=1)
    threshold: float = pydantic.Field(default=1.0, gt=0)


def _num_params(shape: Sequence[int], options: MembaOptions) -> int:
    return 2 * options.rank * shape[0]


def _make_state(shape: Sequence[int], options: MembaOptions) -> nn.Module:
    # Imported here: a plan is made, and help printed, without torch.
    from ssmtune.methods._membrane import Membrane

    return Membrane(shape[0], rank=options.rank, chunk=options.chunk, leak=options.leak, threshold=options.threshold)


METHOD = Method(
    in_module=False,
    summary="Leaky-integrate membranes with a reset on the gate of every Mamba layer, in a causal form of ours.",
    formula="2 R D_in for R membranes",
    source="Lee et al. 2026 (Memba), method; causal form ours",
    mergeable=False,
    at_every_token="moves the gate by membranes, whose potentials no cache of transformers keeps",
    overhead="4 R D_in operations per token, and T / S sequential steps over a prefill of T tokens",
    Options=MembaOptions,
    allows=lambda component: component.role == "state.membrane",
    num_params=_num_params,
    optimizer_group="state",
    make_state=_make_state,
    waits=("membrane_in",),
    size_option="rank",
    needs="Memba needs Mamba-1 or Mamba-2 layers whose gate is one for the whole layer: not Zamba's Mamba-1, which gates "
    "head by head, nor Falcon-H1 without its gated norm; gated delta rules are not ported.",
    recipes={
        "memba": (
            Edit(method="memba", select=("state.membrane",)),
            Edit(method="lora", select=("ssm.in", "ssm.out")),
        )
    },
)
