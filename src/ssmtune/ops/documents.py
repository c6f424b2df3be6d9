"""Run a scan from a trained initial state, in every document of a packed row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ssmtune.ops.seam import Call

Scan = Callable[..., tuple[torch.Tensor, Any]]


def scan_from_state(
    call: Call, entering: Any, scan: Scan, inputs: Sequence[torch.Tensor], *, num_extra: int = 0
) -> tuple[torch.Tensor, Any]:
    """Return `scan(*inputs, state, seq_idx, padding_mask)` with the trained initial state wherever a document begins.

    `inputs` are [B, T, ...], the scan's output as well; a state is a tensor or several, [B, ...] each. `entering` is the
    one that a cache handed on; a continued sequence keeps it. A scan resets its state to zero between documents, so
    packed documents become rows of their own.
    `num_extra` is by how much additional states make the last dimension longer than the initial state's.
    """
    output, final = _scan(call, entering, scan, inputs, num_extra)
    if call.recorded is not None:
        call.recorded["state"] = final
    return output, final


def _scan(
    call: Call, entering: Any, scan: Scan, inputs: Sequence[torch.Tensor], num_extra: int
) -> tuple[torch.Tensor, Any]:
    initial = call.state("initial_state") if call.start is None else call.start.state
    if entering is not None or initial is None:
        return scan(*inputs, entering, call.seq_idx, call.padding_mask)
    if call.start is None:
        initial = F.pad(initial, (0, num_extra))
    if call.seq_idx is None:
        batch = inputs[0].shape[0]
        return scan(*inputs, initial.expand(batch, *initial.shape), None, call.padding_mask)
    documents = DocumentRows(call.seq_idx)
    rows = [documents.split(x) for x in inputs]
    output, final = scan(*rows, initial.expand(rows[0].shape[0], *initial.shape), None, documents.mask)
    last = tuple(part[documents.last] for part in final) if isinstance(final, tuple) else final[documents.last]
    return documents.join(output), last


def convolve_from_window(call: Call, x_BCT: torch.Tensor, convolve: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return `convolve(x, window, seq_idx, padding_mask)` [B, C, T] with the start's window wherever a document begins."""
    if call.start is None:
        return convolve(x_BCT, None, call.seq_idx, call.padding_mask)
    window_CK = call.start.window_CK
    if call.seq_idx is None:
        return convolve(x_BCT, window_CK.expand(x_BCT.shape[0], -1, -1), None, call.padding_mask)
    documents = DocumentRows(call.seq_idx)
    rows = documents.split(x_BCT.transpose(1, 2)).transpose(1, 2)
    output = convolve(rows, window_CK.expand(rows.shape[0], -1, -1), None, documents.mask)
    return documents.join(output.transpose(1, 2)).transpose(1, 2)


class DocumentRows:
    """The documents of packed rows as rows of their own, padded on the right to the longest.

    `mask` [R, L] is 1 on tokens; `last` [B] is the row of each packed row's last document.
    """

    def __init__(self, seq_idx: torch.Tensor) -> None:
        batch, num_steps = seq_idx.shape
        starts = torch.diff(seq_idx, prepend=seq_idx[:, :1] - 1, dim=1) != 0
        number = starts.flatten().cumsum(0) - 1
        first = starts.flatten().nonzero().squeeze(1)
        lengths = torch.diff(first, append=first.new_tensor([batch * num_steps]))
        steps = torch.arange(int(lengths.max()), device=seq_idx.device)
        self.mask = (steps < lengths[:, None]).to(torch.long)
        # Beyond a document's end any token will do: the mask keeps it out of the state, and `join` drops its output.
        self._taken = (first[:, None] + steps).clamp(max=batch * num_steps - 1)
        self._back = number * len(steps) + torch.arange(batch * num_steps, device=seq_idx.device) - first[number]
        self.last = number.view(batch, num_steps)[:, -1]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, ...] as [R, L, ...]."""
        return x.flatten(0, 1)[self._taken]

    def join(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [R, L, ...] as [B, T, ...]."""
        joined = rows.flatten(0, 1)[self._back]
        return joined.view(self.last.shape[0], -1, *joined.shape[1:])
