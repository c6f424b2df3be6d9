"""Compile: what trained initial states and affixes come to, for a server that fills its caches itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from ssmtune.attach import AdaptedModel
from ssmtune.errors import AttachError
from ssmtune.records import write_bytes


def compiled_starts(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """Return what every new sequence starts from, fp32 or in the model's dtype, by the recurrent module's name in the base.

    `<module>.state`: the recurrence's state in the layout of the module's cache, without batch; `<module>.window`
    [C, K-1]: the last inputs of its convolution, where an affix leaves some.
    A cache that holds them before the first token gives `adapted`'s outputs without ssmtune's affix or initial state; other
    trained tensors act beside them. The model is run on one token and not changed.
    Raises `AttachError` when nothing of the adapter has such a form.
    """
    starts: dict[str, torch.Tensor] = {}
    training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad():
            device = next(adapted.parameters()).device
            adapted(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
            for name, call in adapted.calls.items():
                state = call.state("initial_state") if call.start is None else call.start.state
                if state is not None:
                    starts[f"{name}.state"] = state.detach().clone()
                if call.start is not None:
                    starts[f"{name}.window"] = call.start.window_CK.detach().clone()
    finally:
        adapted.train(training)
    if not starts:
        methods = ", ".join(sorted({site.method for site in adapted.plan.sites}))
        raise AttachError(f"nothing to compile: {methods} leaves sequences starting from zero. Serve it merged.")
    return starts


def save_compiled(adapted: AdaptedModel, path: Path) -> None:
    """Write `compiled_starts` to the safetensors file `path`, whole or not at all."""
    starts = {name: value.cpu().contiguous() for name, value in compiled_starts(adapted).items()}
    facts = {"format": "pt", "base_digest": adapted.base_digest, "plan": adapted.plan.digest}
    write_bytes(path, save(starts, metadata=facts))
