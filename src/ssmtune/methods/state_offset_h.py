"""State-offset tuning, h variant: a trained h' is added to the state wherever it is read out, y_t + C_t h'.

Source: Kang et al., "State-offset Tuning", ACL 2025, section 4; for Mamba-2 and Gated DeltaNet the port is ours.
It is not fed back into the recurrence and does not decay.
"""

from __future__ import annotations

from ssmtune.methods._offset import STATE_FORMULA, offset_method

METHOD = offset_method(
    "state_offset_h",
    "state.state_offset",
    summary="A constant added to the state at every read-out.",
    formula=STATE_FORMULA,
    overhead="one more read-out contraction per token",
    adds="what each C reads of a constant state to the output",
)
