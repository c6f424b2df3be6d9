"""What families of Mamba-2 layers share: the operations, the claims with their rows, and packing beside attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssmtune.families._further_states import further_states
from ssmtune.families._transformer import linear
from ssmtune.families.base import Claim

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call


GATED_NORM = "norm"
"""Name of the mixer's module that takes the recurrence's output and its gate z."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths of a mixer: inner channels, states of B (and of C) over all groups, heads."""

    inner: int
    states: int
    heads: int


def mixer_claims(mixer: str, sizes: Callable[[Any], Sizes]) -> tuple[Claim, ...]:
    """Claims of the mixer whose name is `mixer`; `sizes(config)` gives its widths."""

    def in_rows(config: Any) -> tuple[tuple[str, int], ...]:
        """Rows of `in_proj` in order: gate z, input x, B, C, step size dt."""
        size = sizes(config)
        return (
            ("ssm.in.z", size.inner),
            ("ssm.in.x", size.inner),
            ("ssm.in.B", size.states),
            ("ssm.in.C", size.states),
            ("ssm.in.dt", size.heads),
        )

    def conv_rows(config: Any) -> tuple[tuple[str, int], ...]:
        """Channels of the depthwise convolution: those of x, B and C."""
        size = sizes(config)
        return (("ssm.conv.x", size.inner), ("ssm.conv.B", size.states), ("ssm.conv.C", size.states))

    return (
        Claim(path=f"{mixer}.in_proj.weight", role="ssm.in", group="recurrent", rows=in_rows),
        Claim(path=f"{mixer}.in_proj.bias", role="ssm.in.bias", group="recurrent", rows=in_rows),
        *linear(f"{mixer}.out_proj", "ssm.out", "recurrent"),
        Claim(path=f"{mixer}.conv1d.weight", role="ssm.conv", group="conv", access="parameter", rows=conv_rows),
        Claim(path=f"{mixer}.conv1d.bias", role="ssm.conv.bias", group="conv", access="parameter", rows=conv_rows),
        *(
            Claim(path=f"{mixer}.{name}", role=f"ssm.{name}", group="core", access="parameter")
            for name in ("A_log", "D", "dt_bias")
        ),
        Claim(path=f"{mixer}.norm.weight", role="ssm.norm", group="norm"),
    )


def operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our functions under the names that a mixer's forward calls, with the argument conventions of that forward."""
    import torch.nn.functional as F

    from ssmtune.ops.documents import scan_from_state
    from ssmtune.ops.mamba2_chunk_scan import mamba2_chunk_scan
    from ssmtune.ops.selective_state_update import selective_state_update

    limit: Any = module.time_step_limit
    dt_limit = (0.0, math.inf) if limit is None else tuple(limit)

    convolutions, widened = further_states(module, call)

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, *, return_final_states: bool, **extra: Any) -> Any:
        def run(x: Any, dt: Any, B: Any, C: Any, state: Any, seq_idx: Any, padding_mask: Any) -> Any:
            return mamba2_chunk_scan(
                x,
                dt,
                A,
                B,
                C,
                D_H=extra["D"],
                dt_bias_H=extra["dt_bias"],
                initial_states_BHPN=state,
                dt_softplus=extra["dt_softplus"],
                dt_limit=dt_limit,
                seq_idx=seq_idx,
                padding_mask=padding_mask,
            )

        B_wide, C_wide = widened(B, C)
        num_extra = B_wide.shape[-1] - B.shape[-1]
        y, final = scan_from_state(call, extra["initial_states"], run, (x, dt, B_wide, C_wide), num_extra=num_extra)
        y = call.add_offsets(y, _read_out(C)).contiguous()  # Falcon-H1 takes a view of it.
        return (y, final) if return_final_states else y

    def step(
        state: Any,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        *,
        z: Any,
        dt_bias: Any,
        dt_softplus: bool,
        **_: Any,
    ) -> Any:
        # The forward expands per-head values over the head width and state; each copy is the same, so one is taken.
        # It also forgets the limit on dt here, so that decoding would differ from prefill; it is given again.
        B_wide, C_wide = widened(B, C)
        y = selective_state_update(
            state,
            x,
            dt[:, :, 0],
            A[:, 0, 0],
            B_wide,
            C_wide,
            D_H=D[:, 0],
            dt_bias_H=dt_bias[:, 0],
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
        )
        y = call.add_offsets(y, _read_out(C))
        # Falcon-H1 without its norm leaves the gate to this operation.
        return y if z is None else y * F.silu(z)

    return {
        **convolutions,
        "mamba2_chunk_scan": scan,
        "mamba2_selective_state_update": step,
        # The fused operation would swallow out_proj and the gated norm; None makes the forward take its other branch.
        "mamba2_split_conv1d_scan_combined": _declined,
    }


def states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what can be added to the recurrence: H heads of width P, N states."""
    from torch import nn

    mixer: Any = module
    heads, width, size = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    # Without a norm (an identity in Falcon-H1) the gate is multiplied where nothing of ours is called.
    is_reached = not isinstance(mixer.get_submodule(GATED_NORM), nn.Identity)
    return {
        "initial_state": (heads, width, size),
        "state_offset": (heads, width, size),
        "output_offset": (heads, width),
        # Groups, width of the model, taps, and whether the convolution has a bias.
        "additional_scan": (
            mixer.n_groups,
            mixer.in_proj.in_features,
            mixer.conv_kernel_size,
            int(mixer.conv1d.bias is not None),
        ),
        **({"membrane": (mixer.intermediate_size,)} if is_reached else {}),
    }


def entry_rows(module: nn.Module) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """The rows of x, B, C and dt, which follow those of the gate z."""
    mixer: Any = module
    return {"in_proj": ((mixer.intermediate_size, mixer.intermediate_size + mixer.conv_dim + mixer.num_heads),)}


def _read_out(C_GN: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """C h [..., H, P] of a state h [H, P, N]; C [..., G, N] is shared by the heads of a group."""

    def read(h_HPN: torch.Tensor) -> torch.Tensor:
        import torch

        h_GRPN = h_HPN.view(C_GN.shape[-2], -1, *h_HPN.shape[1:])
        return torch.einsum("...gn,grpn->...grp", C_GN.float(), h_GRPN).flatten(-3, -2)

    return read


def _declined(*_: Any, **__: Any) -> None:
    return None
