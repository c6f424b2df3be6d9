"""Training, evaluation, prefill and token-by-token decoding give the same logits.

Compared in fp32, at the trained values and again with every trained value moved: an adapter that one
path leaves out is invisible while it is still the identity.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import (
    PATHS,
    STEP_TOLERANCE,
    in_fp32,
    moved_values,
    path_logits,
    relative_difference,
    tolerance,
    worst_position,
)


def _run(subject: Subject) -> CheckResult:
    with in_fp32(subject.adapted):
        return _run_fp32(subject)


def _run_fp32(subject: Subject) -> CheckResult:
    """Measured: largest difference to path eval, relative to the largest logit. Limit: `STEP_TOLERANCE`."""
    adapted = subject.adapted
    ids_BT = subject.documents[0][None].to(adapted.base_model.model.device)
    limit = tolerance(adapted, STEP_TOLERANCE)
    worst, where = 0.0, ""
    with torch.no_grad():
        for values in ("as trained", "moved"):
            with moved_values(adapted.trained_parameters()) if values == "moved" else nullcontext():
                expected = path_logits(adapted, "eval", ids_BT)
                for path in PATHS:
                    logits = path_logits(adapted, path, ids_BT)
                    difference = relative_difference(logits, expected)
                    if difference > worst:
                        worst = difference
                        where = f"path {path}, token {worst_position(logits[0], expected[0])}, values {values}"
    return CheckResult(
        name="paths_agree",
        ok=worst <= limit,
        measured=worst,
        limit=limit,
        where=where,
        detail=f"{', '.join(PATHS)} over {ids_BT.shape[1]} tokens differ by {worst:.2g} of the largest logit",
    )


CHECK = Check(proves="train, eval, prefill and decode compute the same function", run=_run)
