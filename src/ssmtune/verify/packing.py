"""Documents packed into one row give the logits that each gives alone: neither attention nor state crosses over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import in_fp32, path_logits, relative_difference, tolerance, worst_position

PACKED_PATHS = ("train", "eval")


def _run(subject: Subject) -> CheckResult:
    """Measured: largest difference to the document alone, relative to the largest logit. Limit: `TOLERANCE`."""
    with in_fp32(subject.adapted):
        return compare_packed(subject.adapted, subject.documents)


def compare_packed(model: Any, documents: Sequence[torch.Tensor]) -> CheckResult:
    """Return the packing check of any causal model on `documents`, token ids [T] each."""
    device = model.get_input_embeddings().weight.device
    limit = tolerance(model)
    # Shortest first, so that a boundary falls inside the first chunk of the scan, and a chunk's end inside a document.
    ordered = [document.to(device) for document in sorted(documents, key=len)]
    packed_BT = torch.cat(ordered)[None]
    position_ids = torch.cat([torch.arange(len(document), device=device) for document in ordered])[None]
    worst, where = 0.0, ""
    with torch.no_grad():
        for path in PACKED_PATHS:
            packed = path_logits(model, path, packed_BT, position_ids=position_ids)[0]
            first = 0
            for index, document in enumerate(ordered):
                alone = path_logits(model, path, document[None])[0]
                part = packed[first : first + len(document)]
                difference = relative_difference(part, alone)
                if difference > worst:
                    worst = difference
                    where = f"path {path}, document {index} of {len(ordered)}, token {worst_position(part, alone)}"
                first += len(document)
    return CheckResult(
        name="packing",
        ok=worst <= limit,
        measured=worst,
        limit=limit,
        where=where,
        detail=f"{len(ordered)} documents in one row against each alone: logits differ by {worst:.2g} of the largest",
    )


CHECK = Check(proves="packed documents do not see each other", run=_run)
