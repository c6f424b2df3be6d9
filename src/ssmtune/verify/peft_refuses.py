"""Stock PEFT refuses a directory that it cannot hold, and loads any other with the same logits."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel
from safetensors import safe_open

from ssmtune.adapter_files import OUR_TENSORS, discarded_paths
from ssmtune.verify.base import Check, CheckResult, Subject
from ssmtune.verify.forward import path_logits, relative_difference, tolerance
from ssmtune.verify.fresh import fresh_base

GUARD = "is incompatible with Mamba-based models"


def _run(subject: Subject) -> CheckResult:
    """With extras: measured 1 when PEFT refuses, limit 1. Without: measured is the difference of logits to ours."""
    with safe_open(subject.directory / OUR_TENSORS, framework="pt") as extras:
        num_extras = len(list(extras.keys()))
    try:
        with warnings.catch_warnings():
            # PEFT reads a deprecated attribute of transformers; nobody who reads this report can act on it.
            warnings.simplefilter("ignore", FutureWarning)
            plain = PeftModel.from_pretrained(fresh_base(subject), str(subject.directory))
    except (KeyError, ValueError, TypeError) as error:
        # Stock PEFT also refuses out_proj in some Mamba types, by name, since fused kernels would read past an adapter.
        guarded = GUARD in str(error)
        ok = num_extras > 0 or guarded
        detail = f"{num_extras} tensors are outside PEFT's format and stock PEFT refuses the directory"
        if guarded:
            detail = "stock PEFT refuses an adapter on out_proj of this model type, and says so"
        elif not ok:
            detail = f"stock PEFT refuses a directory that holds nothing of ours: {error}"
        where = "" if ok else str(subject.directory)
        return CheckResult(name="peft_refuses", ok=ok, measured=1, limit=1, where=where, detail=detail)
    if num_extras:
        detail = f"stock PEFT loads the directory and silently drops {num_extras} trained tensors"
        return CheckResult(
            name="peft_refuses",
            ok=False,
            measured=0,
            limit=1,
            where=str(subject.directory / OUR_TENSORS),
            detail=detail,
        )
    return _compare(subject, plain)


def _compare(subject: Subject, plain: PeftModel) -> CheckResult:
    adapted = subject.adapted
    ids_BT = subject.documents[0][None].to(adapted.base_model.model.device)
    limit = tolerance(adapted)
    with torch.no_grad():
        difference = relative_difference(path_logits(plain, "eval", ids_BT), path_logits(adapted, "eval", ids_BT))
    dropped = discarded_paths(adapted.plan)
    ok = difference <= limit
    return CheckResult(
        name="peft_refuses",
        ok=ok,
        measured=difference,
        limit=limit,
        where="" if ok else next(iter(sorted(dropped)), str(subject.directory)),
        detail=f"stock PEFT loads the directory; its logits differ from ours by {difference:.2g} of the largest",
    )


CHECK = Check(proves="stock PEFT either gives the same logits or fails loudly", run=_run)
