"""What the causal convolution must get right. Dimensions: B batch, C channels, T time, K taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmtune.ops.case import Case, Tensors, draw, mask, segments
from ssmtune.ops.causal_conv1d import causal_conv1d, causal_conv1d_update


def cases() -> list[Case]:
    """Return the cases over sequences, and of one step."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length, layout in ((3, ""), (67, ""), (67, "channels last, ")):
        x = draw(generator, 2, 9, length)
        inputs = {
            "x": x.transpose(1, 2).contiguous().transpose(1, 2) if layout else x,
            "weight": draw(generator, 9, 4),
            "bias": draw(generator, 9),
        }
        state = {"initial state": draw(generator, 2, 9, 3)}
        variants: dict[str, Tensors] = {"plain": {}, "continued": state}
        if length > 3:
            packed = {"seq_idx": segments(2, length, (5, 6, 40))}
            padded = {"padding_mask": mask(2, length, 7)}
            variants |= {"packed": packed, "padded": padded, "continued and packed": state | packed}
        found += [
            Case(
                operation="causal_conv1d",
                label=f"{label}, {layout}{length} steps",
                function=_run,
                truth=_truth,
                inputs={**inputs, **extra},
            )
            for label, extra in variants.items()
        ]
    return [*found, _update_case()]


def _run(t: Tensors) -> Tensors:
    output = causal_conv1d(
        t["x"],
        t["weight"],
        t["bias"],
        "silu",
        initial_state_BCK=t.get("initial state"),
        seq_idx=t.get("seq_idx"),
        padding_mask=t.get("padding_mask"),
    )
    return {"output": output}


def _truth(t: Tensors) -> Tensors:
    """A window slides over the inputs; a new document empties it."""
    x_BCT, weight_CK = t["x"], t["weight"]
    if "padding_mask" in t:
        x_BCT = x_BCT * t["padding_mask"][:, None].to(x_BCT.dtype)
    past = t.get("initial state", x_BCT.new_zeros(*x_BCT.shape[:2], weight_CK.shape[1] - 1))
    steps = []
    for step in range(x_BCT.shape[-1]):
        if "seq_idx" in t and step > 0:
            past = past * (t["seq_idx"][:, step] == t["seq_idx"][:, step - 1])[:, None, None]
        window = torch.cat([past, x_BCT[..., step : step + 1]], dim=-1)
        steps.append((window * weight_CK).sum(-1) + t["bias"])
        past = window[..., 1:]
    return {"output": F.silu(torch.stack(steps, dim=-1))}


def _update_case() -> Case:
    def run(t: Tensors) -> Tensors:
        with torch.no_grad():
            state = t["state"].clone()
            output = causal_conv1d_update(t["x"], state, t["weight"], t["bias"], "silu")
        return {"output": output, "state": state}

    def truth(t: Tensors) -> Tensors:
        with torch.no_grad():
            sequence = torch.cat([t["state"], t["x"]], dim=-1)
            output = _truth({"x": sequence, "weight": t["weight"], "bias": t["bias"]})["output"]
        return {"output": output[..., -1:], "state": sequence[..., 1:]}

    generator = torch.Generator().manual_seed(2)
    inputs = {
        "x": draw(generator, 3, 9, 1),
        "state": draw(generator, 3, 9, 4),
        "weight": draw(generator, 9, 4),
        "bias": draw(generator, 9),
    }
    return Case(operation="causal_conv1d_update", label="one step", function=run, truth=truth, inputs=inputs)
