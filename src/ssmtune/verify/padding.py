"""Padding on either side changes no logit of a real token, in one pass and in the step after a padded prefill."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import cache_name, in_fp32, path_logits, relative_difference, tolerance, worst_position


def _run(subject: Subject) -> CheckResult:
    with in_fp32(subject.adapted):
        return _run_fp32(subject)


def _run_fp32(subject: Subject) -> CheckResult:
    """Measured: largest difference to the document alone, relative to the largest logit. Limit: `TOLERANCE`."""
    adapted = subject.adapted
    device = adapted.base_model.model.device
    documents = [document.to(device) for document in subject.documents]
    limit = tolerance(adapted)
    worst, where = 0.0, ""
    with torch.no_grad():
        alone = [path_logits(adapted, "eval", document[None])[0] for document in documents]
        for side in ("left", "right"):
            ids_BT, mask_BT, position_ids = _padded(documents, side)
            logits = path_logits(adapted, "eval", ids_BT, attention_mask=mask_BT, position_ids=position_ids)
            for index, expected in enumerate(alone):
                real = logits[index][mask_BT[index].bool()]
                difference = relative_difference(real, expected)
                if difference > worst:
                    worst = difference
                    where = f"{side} padding, document {index}, token {worst_position(real, expected)}"
        for index, (step, expected) in enumerate(zip(_next_token(adapted, documents), alone, strict=True)):
            difference = relative_difference(step, expected[-1])
            if difference > worst:
                worst, where = difference, f"decode after left padding, document {index}"
    return CheckResult(
        name="padding",
        ok=worst <= limit,
        measured=worst,
        limit=limit,
        where=where,
        detail=f"{len(documents)} documents padded left and right against each alone: {worst:.2g} of the largest logit",
    )


def _padded(
    documents: list[torch.Tensor], side: Literal["left", "right"] | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, mask and position ids, [B, T] each; a pad is token 1, so that its embedding is not zero."""
    width = max(map(len, documents))
    ids, masks = [], []
    for document in documents:
        extra = width - len(document)
        pad = (extra, 0) if side == "left" else (0, extra)
        ids.append(F.pad(document, pad, value=1))
        masks.append(F.pad(torch.ones_like(document), pad))
    mask_BT = torch.stack(masks)
    return torch.stack(ids), mask_BT, (mask_BT.cumsum(-1) - 1).clamp_min(0)


def _next_token(model: Any, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [V] of each document's last token, decoded after a left-padded prefill of the tokens before it."""
    ids_BT, mask_BT, position_ids = _padded(documents, "left")
    model.eval()
    prefix = model(
        input_ids=ids_BT[:, :-1], attention_mask=mask_BT[:, :-1], position_ids=position_ids[:, :-1], use_cache=True
    )
    step = model(
        input_ids=ids_BT[:, -1:],
        attention_mask=mask_BT,
        position_ids=position_ids[:, -1:],
        use_cache=True,
        **{cache_name(model): prefix[cache_name(model)]},
    )
    return list(step.logits[:, -1])


CHECK = Check(proves="padding changes nothing", run=_run)
