"""What of the base is in 4 bits is what was chosen, and no path reads its codes as values."""

from __future__ import annotations

from ssmtune.quantize import four_bit_faults
from ssmtune.verify.base import Check, CheckResult, Subject


def _run(subject: Subject) -> CheckResult:
    """Measured: tensors that are in 4 bits and should not be, or the reverse. Limit: 0."""
    adapted = subject.adapted
    faults = four_bit_faults(adapted.base_model.model)
    quantized = adapted.quantized
    detail = "nothing of the base is in 4 bits" if quantized is None else f"the base is in {quantized.describe()}"
    if faults:
        path, fault = next(iter(faults.items()))
        detail = f"{path} {fault}"
    elif quantized is not None:
        detail += "; each is used through its module alone, on every path"
    return CheckResult(
        name="four_bits", ok=not faults, measured=len(faults), limit=0, where=", ".join(list(faults)[:4]), detail=detail
    )


CHECK = Check(proves="what is in 4 bits is what was chosen, and nothing reads its codes as values", run=_run)
