"""What the Mamba-1 architectures share: rows and claims of a mixer, and the functions under its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ssmtune.families._convolution import convolution_operations
from ssmtune.families._transformer import linear
from ssmtune.families.base import Claim

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmtune.ops.seam import Call

Rows = Callable[[Any], tuple[tuple[str, int], ...]]


def in_proj_rows(inner: int) -> tuple[tuple[str, int], ...]:
    """Rows of `in_proj` in order: input x, then its gate z."""
    return (("ssm.in.x", inner), ("ssm.in.z", inner))


def x_proj_rows(dt_rank: int, state_size: int) -> tuple[tuple[str, int], ...]:
    """Rows of `x_proj` in order: the low-rank step size dt, then B and C."""
    return (("ssm.x_proj.dt", dt_rank), ("ssm.x_proj.B", state_size), ("ssm.x_proj.C", state_size))


def scan_claims(mixer: str, *, in_rows: Rows) -> tuple[Claim, ...]:
    """Claims of what every Mamba-1 mixer owns under the same name; `mixer` is its name with a dot at the end."""
    return (
        Claim(path=mixer + "in_proj.weight", role="ssm.in", group="recurrent", rows=in_rows),
        Claim(path=mixer + "in_proj.bias", role="ssm.in.bias", group="recurrent", rows=in_rows),
        *linear(mixer + "out_proj", "ssm.out", "recurrent"),
        Claim(path=mixer + "conv1d.weight", role="ssm.conv", group="conv", access="parameter"),
        Claim(path=mixer + "conv1d.bias", role="ssm.conv.bias", group="conv", access="parameter"),
        Claim(path=mixer + "A_log", role="ssm.A_log", group="core", access="parameter"),
        Claim(path=mixer + "D", role="ssm.D", group="core", access="parameter"),
    )


def mixer_claims(mixer: str, *, in_rows: Rows, x_rows: Rows) -> tuple[Claim, ...]:
    """Claims of a mixer whose x_proj and dt_proj are linears; the forward multiplies by dt_proj's weight itself."""
    return (
        *scan_claims(mixer, in_rows=in_rows),
        Claim(path=mixer + "x_proj.weight", role="ssm.x_proj", group="recurrent", rows=x_rows),
        Claim(path=mixer + "dt_proj.weight", role="ssm.dt_proj", group="recurrent", access="parameter"),
        Claim(path=mixer + "dt_proj.bias", role="ssm.dt_bias", group="core", access="parameter"),
    )


def operations(module: nn.Module, call: Call) -> Mapping[str, Callable[..., Any]]:
    """Our functions under the names that a Mamba-1 mixer's forward calls, with the argument conventions of that forward."""
    import torch
    import torch.nn.functional as F

    from ssmtune.ops.documents import scan_from_state
    from ssmtune.ops.mamba1_selective_scan import mamba1_selective_scan, mamba1_state_update
    from ssmtune.ops.membrane import driven_gate

    layer: Any = module.layer_idx

    def with_offsets(y_D: Any, A_DN: Any, C_N: Any, z_D: Any) -> Any:
        """`y_D` [..., D] is gated by z already; C [..., N] reads the state."""
        of_scan = _restricted(call, _channels(A_DN))
        return of_scan.add_offsets(y_D, lambda h_DN: C_N.float() @ h_DN.T, lambda: F.silu(z_D.float()))

    def widened(x_D: Any, A_DN: Any, B_N: Any, C_N: Any) -> tuple[Any, Any, Any]:
        """A, B and C with those of the additional states behind the model's own; B and C are [..., N]."""
        call.hidden_BTD = None  # its rows read what was convolved
        extra = call.edit("additional_scan")
        if extra is None:
            return A_DN, B_N, C_N
        parts = ((A_DN, extra.A(A_DN)), (B_N, extra.B(x_D)), (C_N, extra.C(x_D)))
        A, B, C = (torch.cat(pair, dim=-1) for pair in parts)
        return A, B, C

    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, *, return_last_state: bool, **extra: Any) -> Any:
        def run(x: Any, dt: Any, B: Any, C: Any, z: Any, state: Any, seq_idx: Any, mask: Any) -> Any:
            y, final = mamba1_selective_scan(
                x.transpose(1, 2),
                dt.transpose(1, 2),
                A_wide,
                B.transpose(1, 2),
                C.transpose(1, 2),
                D_D=extra["D"],
                z_BDT=z.transpose(1, 2),
                dt_bias_D=extra["delta_bias"],
                dt_softplus=extra["delta_softplus"],
                initial_state_BDN=state,
                seq_idx=seq_idx,
                padding_mask=None if mask is None else mask[:, -x.shape[1] :],
            )
            return y.transpose(1, 2), final

        channels = _channels(A)
        x_BTD, dt_BTD, B_BTN, C_BTN, z_BTD = (tensor.transpose(1, 2) for tensor in (x, dt, B, C, extra["z"]))
        z_BTD = driven_gate(call, layer, z_BTD)
        A_wide, B_wide, C_wide = widened(x_BTD, A, B_BTN, C_BTN)
        y, final = scan_from_state(
            _restricted(call, channels),
            _entering_state(call, layer, channels),
            run,
            (x_BTD, dt_BTD, B_wide, C_wide, z_BTD),
            num_extra=A_wide.shape[-1] - A.shape[-1],
        )
        y = with_offsets(y, A, C_BTN, z_BTD).contiguous()
        y = y.transpose(1, 2)  # out_proj's input is the transpose of this
        return (y, final) if return_last_state else y

    def step(
        state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, *, z: Any, dt_bias: Any, dt_softplus: bool
    ) -> Any:
        A_wide, B_wide, C_wide = widened(x, A, B, C)
        z = driven_gate(call, layer, z)
        y = mamba1_state_update(
            state, x, dt, A_wide, B_wide, C_wide, D_D=D, z_BD=z, dt_bias_D=dt_bias, dt_softplus=dt_softplus
        )
        return with_offsets(y, A, C, z)

    return {
        **convolution_operations(module, call),
        "mamba_selective_scan": scan,
        "mamba_selective_state_update": step,
        "apply_mask_to_padding_states": _unmasked,
    }


def states(module: nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what can be added to the recurrence: D inner channels, N states."""
    mixer: Any = module
    channels, size = mixer.intermediate_size, mixer.ssm_state_size
    return {
        "initial_state": (channels, size),
        "state_offset": (channels, size),
        "output_offset": (channels,),
        "additional_scan": (channels, size),
        "membrane": (channels,),
    }


def entry_rows(module: nn.Module) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """The rows of x; those of its gate z act on the output alone."""
    mixer: Any = module
    return {"in_proj": ((0, mixer.intermediate_size),)}


def _unmasked(hidden_states: Any, _: Any) -> Any:
    """The input of a projection as it is: the convolution and the scan leave padding out themselves.

    Contiguous, since PyTorch sums a product with a strided input in an order that depends on what requires gradients.
    """
    return hidden_states.contiguous()


def _entering_state(call: Call, layer: int, channels: slice) -> torch.Tensor | None:
    """The cached state [B, D, N] of some channels, None at the start of a sequence.

    The forward gives it to single steps only: without it a longer continuation would start from zero.
    """
    state = None if call.cache is None else call.cache.get_recurrent_state(layer)
    if state is None:
        return None
    return state.flatten(1, -2)[:, channels]  # type: ignore[no-any-return]


def _channels(A_DN: torch.Tensor) -> slice:
    """The channels of the mixer that a scan with `A_DN` computes.

    Zamba scans head by head: its A is then a view of the mixer's whole A, and where it begins says which channels.
    """
    num_channels, state_size = A_DN.shape
    first = A_DN.storage_offset() // state_size
    return slice(first, first + num_channels)


def _restricted(call: Call, channels: slice) -> Call:
    """The call as a scan of some channels sees it: with their part of what is added to the recurrence."""
    parts = {name: _Part(edit, channels) for name, edit in call.states.items()}
    return replace(call, states=parts) if parts else call


@dataclass(frozen=True)
class _Part:
    """The channels of an addition to the recurrence, [D, ...], that one scan computes."""

    whole: Any
    channels: slice

    @property
    def enabled(self) -> bool:
        return bool(self.whole.enabled)

    def __call__(self) -> torch.Tensor:
        value: torch.Tensor = self.whole()
        return value[self.channels]
