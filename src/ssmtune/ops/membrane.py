"""Leaky-integrate membranes on a layer's gate: a small nonlinear memory that the gate sees beside its own input.

Dims: B rows, T steps, D channels of the gate, R membranes, S steps of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ssmtune.ops.documents import DocumentRows
from ssmtune.ops.precision import outside_autocast
from ssmtune.ops.seam import Call

SLOT = 1
"""Index of the state of a cache's layer that holds the membranes as its recurrent state; 0 is the model's own."""


@outside_autocast
def leaky_membrane(
    drive_BTR: torch.Tensor,
    entering_BSR: torch.Tensor,
    *,
    leak: float,
    threshold: float,
    padding_mask_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the membranes u [B, T, R] and those of the last S tokens [B, S, R], both in the dtype given.

    u_t = r(leak u_{t-S} + drive_t), r(x) = 0 above `threshold` and x up to it; `entering_BSR` are the S tokens before the
    first. The chunks of S tokens follow one another, and within a chunk all tokens are computed at once.
    A padded step is no token: it drives, ages and resets nothing, and its membrane is zero.
    The gradient is that of the piece of r on which a value lies: one up to the threshold, zero where it resets.
    """
    num_kept = entering_BSR.shape[1]
    if padding_mask_BT is None:
        u_BTR = _charge(drive_BTR, entering_BSR, leak, threshold)
        return u_BTR, torch.cat([entering_BSR, u_BTR], dim=1)[:, -num_kept:]
    is_token = padding_mask_BT.bool()
    # Tokens first, in their order; what follows them reaches no token.
    order = is_token.logical_not().long().argsort(dim=1, stable=True)
    u_BTR = _charge(torch.take_along_dim(drive_BTR, order[..., None], dim=1), entering_BSR, leak, threshold)
    kept = is_token.sum(dim=1, keepdim=True) + torch.arange(num_kept, device=order.device)
    leaving_BSR = torch.take_along_dim(torch.cat([entering_BSR, u_BTR], dim=1), kept[..., None], dim=1)
    u_BTR = torch.take_along_dim(u_BTR, order.argsort(dim=1)[..., None], dim=1)
    return torch.where(is_token[..., None], u_BTR, 0.0), leaving_BSR


def _charge(drive_BTR: torch.Tensor, entering_BSR: torch.Tensor, leak: float, threshold: float) -> torch.Tensor:
    chunks = []
    last_BSR = entering_BSR
    for drive in torch.split(drive_BTR, entering_BSR.shape[1], dim=1):
        charged = leak * last_BSR[:, : drive.shape[1]] + drive
        last_BSR = torch.where(charged > threshold, 0.0, charged)
        chunks.append(last_BSR)
    return torch.cat(chunks, dim=1)


def driven_gate(call: Call, layer: int, z: torch.Tensor) -> torch.Tensor:
    """Return the gate [B, T, D] (or [B, D] for a single step) with what the layer's membranes add to it, in its dtype.

    The gate itself where no membranes are attached, and while learned positions run, whose output is dropped.
    Membranes start at zero in every document; a continued sequence takes those that `layer` of the cache keeps.
    """
    edit = call.states.get("membrane")
    if edit is None or call.recorded is not None:
        return z
    if not edit.enabled:
        # In the layout that it has with membranes: the rounding of what follows depends on it.
        return z.contiguous()
    gate_BTD = z if z.dim() == 3 else z[:, None]
    drive_BTR = _linear(gate_BTD.float(), edit.membrane_in)
    mask = None if call.padding_mask is None else call.padding_mask[:, -gate_BTD.shape[1] :]
    documents = None if call.seq_idx is None else DocumentRows(call.seq_idx)
    if documents is not None:
        drive_BTR, mask = documents.split(drive_BTR), documents.mask
    states = None if call.cache is None else call.cache.layers[layer]
    kept = None if states is None or documents is not None else states.recurrent_states.get(SLOT)
    entering = drive_BTR.new_zeros(drive_BTR.shape[0], edit.chunk, drive_BTR.shape[-1]) if kept is None else kept
    u_BTR, leaving = leaky_membrane(drive_BTR, entering, leak=edit.leak, threshold=edit.threshold, padding_mask_BT=mask)
    if documents is not None:
        u_BTR, leaving = documents.join(u_BTR), leaving[documents.last]
    if states is not None:
        _keep(states, leaving)
    return (gate_BTD.float() + _linear(u_BTR, edit.membrane_out)).to(z.dtype).view(z.shape).contiguous()


@outside_autocast
def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _keep(layer: Any, leaving_BSR: torch.Tensor) -> None:
    """Keep membranes in the cache's layer, which resets, reorders and moves them along with its own states."""
    layer.number_of_states = SLOT + 1
    layer.conv_states.setdefault(SLOT, None)
    layer.conv_kernel_size.setdefault(SLOT, None)
    layer.is_conv_states_initialized.setdefault(SLOT, False)
    layer.recurrent_states[SLOT] = leaving_BSR
    layer.is_recurrent_states_initialized[SLOT] = layer.has_previous_state[SLOT] = True
